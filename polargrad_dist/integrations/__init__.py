"""PolarGrad under the frameworks of others; a module for each, which imports its framework only when it is used."""
