"""Several ranks, one run: what they agree on, FSDP2 for the policy and for frozen modules."""
