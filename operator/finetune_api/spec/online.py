"""Methods that learn from what the model itself writes: it answers prompts, the answers are scored, and it learns.

Words that are used here as in the field: a *rollout* is one answer that the model wrote; an *iteration* is a set of
rollouts and the optimizer steps that learn from it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract, Rule
from finetune_api.spec.rewards import UNIQUE_REWARD_NAMES, RewardList

__all__ = ["Critic", "Grpo", "KlPenalty", "OnlineMethod", "Ppo", "Sampling", "Vllm"]

USUAL_KL_LIMIT = 3.0
"""Nats per token. Runs that learn well were seen at up to 1.2, where an answer has twelve tokens; of one that is 5 away
nothing is left."""

Clip = Annotated[float, Field(gt=0, le=0.99)]
Passes = Annotated[int, Field(ge=1, le=64)]

_OF_ALL = (
    UNIQUE_REWARD_NAMES,
    Rule(
        cel="self.sampling.maxNewTokens < self.maxSeqLength",
        message="sampling.maxNewTokens must leave room for a prompt; raise maxSeqLength or lower it",
        holds=lambda m: m.sampling.max_new_tokens < m.max_seq_length,
        field="maxSeqLength",
    ),
)


class Sampling(Contract):
    """How rollouts are drawn from the model."""

    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 256
    """Longest answer; a longer one is cut there."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Below 1 the likely tokens become likelier. What is learned is the policy at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens of this probability in all. Below 1 rollouts are no samples of the policy."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Draw from so many of the likeliest tokens; 0: from all. See topP."""
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Above 1: the best answers of a beam search, for grpo groupSize of them. See topP."""

    @property
    def bias(self) -> str | None:
        """Why rollouts are no draws of the policy that learns from them; None where they are."""
        if self.num_beams > 1:
            return (
                "the likeliest answers of a search stand in the place of draws: they count alike, however likely they"
                " are, and the importance ratio takes them for draws; so the policy is drawn towards what it says most"
                " already, and less likely answers are never learned from"
            )
        if self.top_p < 1 or self.top_k > 0:
            return (
                "unlikely tokens are never drawn, and the importance ratio is that of the whole distribution; so the"
                " policy is drawn towards the tokens that are likely already, and the others are never learned from"
            )
        return None


class Vllm(Contract):
    """vLLM, in an environment of its own beside the trainers."""

    tensor_parallel_size: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes of a worker that share one vLLM, split over their GPUs: divides the worker's gpus and the model's
    attention heads."""
    kv_cache_gib: Annotated[int, Field(ge=1, le=1024)] = 2
    """GiB of each GPU, or process, for keys and values."""
    gap_limit: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Mean nats per token between trainer and vLLM, above which condition RolloutFaithful is False."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Iterations that rollouts may be behind. 1: vLLM writes while the model learns: a wider gap, and resuming writes
    anew."""


class OnlineMethod(Contract):
    """What PPO and GRPO have in common."""

    rewards: RewardList
    """What a rollout is worth: the weighted sum of these."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How rollouts are drawn."""
    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Tokens of a prompt with its answer. Prompts may have maxSeqLength - sampling.maxNewTokens."""
    long_rows: Literal["error", "drop"] = "error"
    """A longer prompt: `error` stops before training, naming the rows, `drop` leaves it out."""
    mini_batches: Annotated[int, Field(ge=1, le=1024)] = 1
    """Optimizer steps that learn from all rollouts of an iteration, miniBatches × globalBatchSize, once."""
    clip_low: Clip = 0.2
    """How far one iteration may make a token less likely: to 1 - clipLow times its probability."""
    clip_high: Annotated[float, Field(gt=0, le=10)] = 0.2
    """How far one iteration may make a token likelier: to 1 + clipHigh times. DAPO has 0.28 (arXiv 2503.14476)."""
    missing_eos_penalty: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Taken off the reward of a rollout that was cut off."""
    max_kl: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Nats per token between model and reference at which the run fails with KLDiverged: such a model is not saved. 0:
    no limit. Left out: 3 where distance has a price."""

    vllm: Vllm | None = None
    """Who writes rollouts, in the place of the trainers."""

    passes: Passes = 1
    """Times that each rollout is learned from."""

    @property
    def rollouts_per_prompt(self) -> int:
        """Answers to each prompt of an iteration."""
        return 1

    @property
    @abstractmethod
    def prices_distance(self) -> bool:
        """Whether it costs something to stray from the reference, so that it is asked in any case."""

    @property
    def kl_limit(self) -> float:
        """Nats per token that the model may be from its reference; 0: no limit."""
        if self.max_kl is not None:
            return self.max_kl
        return USUAL_KL_LIMIT if self.prices_distance else 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the model before training is asked about rollouts."""
        return self.prices_distance or self.kl_limit > 0

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps that learn from the same rollouts."""
        return self.mini_batches * self.passes


class KlPenalty(Contract):
    """What it costs to stray from the reference, which is the model before training."""

    coefficient: Annotated[float, Field(ge=0, le=100)] = 0.05
    """Taken off each token's reward, times the difference of its log-probabilities (k1). 0 needs no reference,
    unless maxKl is set."""
    target: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Nats per rollout that are wanted: the coefficient rises while the model strays farther, else falls (Ziegler et
    al. 2019, arXiv 1909.08593). Left out: it stays."""
    horizon: Annotated[int, Field(ge=1, le=1_000_000_000)] = 10_000
    """Rollouts in which the coefficient may change by a factor of about 1.2; with a target only."""

    rules = (
        Rule(
            cel="!has(self.target) || self.coefficient > 0.0",
            message="a coefficient of 0 can never be raised to reach the target; set it above 0",
            holds=lambda k: k.target is None or k.coefficient > 0,
            field="coefficient",
        ),
    )


class Critic(Contract):
    """The model that says how much reward is still to come, token by token."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its peak learning rate; the model's own when left out."""
    warmup_iterations: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Iterations in which the critic alone learns."""
    coefficient: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Weight of the critic's loss beside the model's. With AdamW it matters for the common clipping of gradients
    alone."""
    clip: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """How far one iteration may move a value; 0 for no bound."""
    begins_as: Literal["policy", "reward"] = "policy"
    """`policy`: the model itself with a value of 0. `reward`: the model among rewards; with tuning.lora it must be an
    adapter of the same model."""


class Ppo(OnlineMethod):
    """Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler
    et al. 2019, arXiv 1909.08593): model, critic and reference live in every worker, and share one frozen base with
    tuning.lora."""

    passes: Passes = 4
    """Times that each rollout is learned from."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much a reward is worth one token earlier."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Between the critic's word (0) and the rewards themselves (1), in generalised advantage estimation (arXiv
    1506.02438)."""
    kl: KlPenalty = Field(default_factory=KlPenalty)
    """What it costs to stray from the reference."""
    critic: Critic = Field(default_factory=Critic)
    """The critic."""
    whiten_advantages: bool = True
    """Advantages of an iteration get mean 0 and deviation 1."""
    normalize_rewards: bool = False
    """Rewards are divided by the deviation of all rewards so far."""
    reward_clip: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Rewards are held between -rewardClip and rewardClip, after normalizeRewards."""
    dual_clip: Annotated[float, Field(gt=1, le=100)] | None = None
    """Bounds the loss of a token with a negative advantage, however likely it is now (arXiv 1912.09729)."""
    stop_kl: Annotated[float, Field(gt=0, le=100)] | None = None
    """Nats per token between the model and the one that wrote the rollouts, beyond which the rest of an iteration's
    steps is left out."""

    rules = (
        Rule(
            cel="!has(self.dualClip) || self.dualClip > 1.0 + self.clipHigh",
            message="dualClip must be above 1 + clipHigh; raise it, or remove it",
            holds=lambda p: p.dual_clip is None or p.dual_clip > 1 + p.clip_high,
            field="dualClip",
        ),
        Rule(
            cel="self.critic.beginsAs == 'policy' || self.rewards.exists_one(r, has(r.model))",
            message="beginsAs reward needs one model among rewards, and one only; add it, or set beginsAs to policy",
            holds=lambda p: p.critic.begins_as == "policy" or sum(r.model is not None for r in p.rewards) == 1,
            field="critic.beginsAs",
        ),
        *_OF_ALL,
    )

    @property
    def prices_distance(self) -> bool:
        return self.kl.coefficient > 0


class Grpo(OnlineMethod):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): several answers to each prompt are
    compared with one another, and no critic is needed. With dynamicSampling, overlongBuffer, clipHigh 0.28 and
    aggregation token it is DAPO (Yu et al. 2025, arXiv 2503.14476)."""

    group_size: Annotated[int, Field(ge=2, le=1024)] = 8
    """Answers to each prompt."""
    baseline: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """What an answer is compared with: `grpo` its group's mean, divided by the deviation; `dr_grpo` the mean alone
    (arXiv 2503.20783); `rloo` the others' mean (arXiv 2402.14740)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """How tokens are weighed: `token` all alike; `sequence` each answer alike; `constant` by maxNewTokens, so that no
    answer can change its weight by its length."""
    kl_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the distance to the reference in the loss (k3); 0 needs no reference."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=16)] = 0
    """Further prompts are asked, so many times at most, until enough groups have answers of different reward: the
    others teach nothing. 0: such groups stay."""
    overlong_buffer: Annotated[int, Field(ge=0, le=131_072)] = 0
    """Over the last so many tokens before maxNewTokens an answer loses up to 1 of its reward; 0: none."""

    rules = (
        *_OF_ALL,
        Rule(
            cel="self.overlongBuffer <= self.sampling.maxNewTokens",
            message="overlongBuffer must not be longer than sampling.maxNewTokens; lower it",
            holds=lambda m: m.overlong_buffer <= m.sampling.max_new_tokens,
            field="overlongBuffer",
        ),
    )

    @property
    def rollouts_per_prompt(self) -> int:
        return self.group_size

    @property
    def prices_distance(self) -> bool:
        return self.kl_coefficient > 0
