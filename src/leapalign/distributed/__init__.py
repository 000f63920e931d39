"""Training on several ranks: their agreement, FSDP2 for the policy, FSDP of frozen modules."""
