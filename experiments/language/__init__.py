"""The paper's language-model experiments, scaled down to minutes on a CPU, and a race of optimizers on equal terms."""
