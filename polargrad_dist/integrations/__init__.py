"""What other trainers need to save and resume `PolarGrad`: one module for each, imported by name.

Lightning needs none: it calls ``optimizer.consolidate_state_dict()`` itself. Nothing is imported here, so that no module
asks for another's packages.
"""
