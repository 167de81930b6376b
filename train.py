"""Trains and evaluates one experiment: python train.py +experiment=omniglot_5way_1shot.

    conf/                     the yaml files that the command line chooses from and changes
    maml/cli/train.py         Hydra composes the config; how the process ends
    maml/config/schema.py     every key is checked against the constructor that takes it
    maml/experiment.py        domain, model, inner, outer and algorithm are built, trained and evaluated
    maml/training/loop.py     the loop over meta-iterations
    maml/evaluation.py        meta-test on a frozen bank of tasks
    maml/record/              the run folder, its checkpoints and its report
    maml/paper/verdicts.py    what the number means beside the paper's

``python train.py --help`` shows the keys, ``maml describe KEY`` explains one, ``maml list`` names the experiments.
"""

from maml.cli.train import main

if __name__ == "__main__":
    main()
