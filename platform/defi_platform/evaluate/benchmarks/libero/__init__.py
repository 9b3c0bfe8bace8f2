"""LIBERO: table-top manipulation of a Panda arm (MuJoCo, robosuite), with the variants of LIBERO-PRO."""
