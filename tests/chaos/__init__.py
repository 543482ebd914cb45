"""`python -m tests.chaos --minutes N`: faults at random over real runs of two ranks, each of which must end as if undisturbed."""
