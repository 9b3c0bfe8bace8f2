"""Push-T: a round hand pushes a T-shaped block onto its outline, seen from above (gym-pusht)."""
