"""Ray Serve: policy replicas that batch across clients, and the gateway that speaks wire protocols."""
