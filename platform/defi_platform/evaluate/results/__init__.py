"""Results of an evaluation: tables of episodes and steps, the summary with the protocol, and exports of them."""
