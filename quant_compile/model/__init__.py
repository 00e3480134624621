"""What a model holds: names of its Parameters, its weights, the plan of a policy for them, and the ledger of what became of them."""
