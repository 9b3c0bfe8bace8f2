"""The public port of a node: accepts connections and passes each to a policy replica."""
