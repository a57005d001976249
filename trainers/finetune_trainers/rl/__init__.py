"""The maths of learning from preferences, rewards and teachers: pure tensor functions, one formula each.

    logprobs          log-probabilities and entropy of tokens, a few rows of the vocabulary at a time
    statistics        masked means and variances, whitening, moments that add up over iterations
    kl                estimators of the distance to a reference, and who sets its price
    rewards           from scores to the reward of each token
    advantages        from rewards to advantages: GAE, groups, leave-one-out
    policy_losses     the clipped surrogate of PPO and its relatives, per token
    value_losses      the critic's
    preference_losses DPO, KTO, ORPO and the reward model's, per pair or per row
    distillation      divergences between student and teacher, per token
    aggregation       from losses per token to the one number of a step

Nothing here knows a model, a process group or a job; the folder imports torch and the standard library only, and a
contract of the import linter keeps it so. Losses are returned per token, row or pair: methods make them one number, so
that micro-batches and ranks add up to the loss of the global batch.
"""
