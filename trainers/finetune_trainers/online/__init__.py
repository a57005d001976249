"""Learning from what the model itself writes: PPO and GRPO, as methods of the one loop.

    method      an iteration: prompts, rollouts, rewards, and the optimizer steps that learn from them
    grpo, ppo   what is special about each: advantages and loss
    episodes    rollouts with all that is known of them, and the batches made of them
    models      what policy, reference and critic say of a batch
    critic      the critic that is added to the policy before the engine is built
    adapters    several adapters on one frozen base, and which of them is in use
    memory      what was freed is given back
    building    all of it, from a plan

Every rank knows all rollouts of an iteration, which are small; generating, scoring and asking the models is shared out.
So which rollouts a step learns from does not depend on the number of ranks. Nothing of an iteration is part of a
checkpoint: checkpoints lie between iterations, and sampling follows from the seed and from a prompt's place in the
stream.
"""
