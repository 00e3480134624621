"""What a policy and the backend do to a model, shown: plans before anything runs, graphs and kernels after."""
