"""Data sets with questions and answers, for midtraining, finetuning, reinforcement learning and evaluation."""
