"""Objects of Kubernetes: pods, network policies, Ray clusters, jobs and the service of a policy."""
