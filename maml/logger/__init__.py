"""Mirrors of a run's local record: where its numbers are shown beside the files that hold them."""
