"""What a task is: one file per domain."""
