"""TreePO: tree-based policy optimisation with segment-level sampling.

Paper      Li et al., arXiv 2508.17445; released code at f055523.
Objective  Trees of segments under a budget of w paths (sampler `segments`); for leaf i and every ancestor group G_j(i) with at
           least two leaves, the root's included: A_ij = R_i - mean R over G_j(i);
           A_i = mean over j of A_ij (eq. 5), one scalar on the whole response i, then whitened over all response tokens of the
           batch; R = +1 or -1, minus up to 1 over the last tokens before the limit (overlong);
           L = - mean over tokens of min(r A, clip(r, 1 - 0.2, 1 + 0.28) A), for A < 0 at least 10 A (dual clip); no KL;
           problems whose leaves are all right or all wrong are dropped and replaced, in at most two more rounds.
Denominator  the response tokens of every leaf (a shared token counts once per leaf through it), whitened with their mean and
           unbiased variance.
Differs    A group that repeats along an unbranched chain counts once (`--credit.repeat-groups` as released); the remainder of an
           even split goes to random paths (`--sampler.remainder last` as released); token mean over the whole mini-batch, not
           per micro-batch; old log-probs of the update's own model, once per unique token; a box is looked for in the whole
           response, not in its last segment. Left out: the budget by tokens of an engine call (it depends on what else is in
           the batch), one draw of starts shared by all problems, a least length of finished paths.
Measured   On the embedded job's dev problems (results/tree_sampling), base model: fallback happens in 13 % of the trees with 2 to 8
           starts (43 % with 2) and starts 5.5 % (19 %) of their responses, half of them anew at the prompt; cuts keep a third of
           the path, so it leans to short prefixes; 3.6 % (20 %) of the tokens come after it. Leaves are longer than independent
           responses by 5.3 tokens [4.2, 6.5] and their Pass@1 is higher by 3.0 points [1.1, 4.9], with and without fallback: open
           paths inherit the budget of ended ones. Ending a path at its box changed neither cost nor accuracy there.
Uncertain  The paper calls its scale both a per-response std and a global one; the released code whitens the batch. Which run
           had more initial divergence: the released script's key for it never takes effect.
"""

from rlzoo.algorithm import Algorithm, Optim, Schedule
from rlzoo.credit.ancestors import Ancestors
from rlzoo.credit.filters import GroupFilter
from rlzoo.losses.policy import PolicyLoss
from rlzoo.rewards.shaping import Outcome
from rlzoo.sampling.segments import Segments
from rlzoo.sampling.stopping import StopRules

algorithm = Algorithm(
    name="treepo",
    card=__doc__,
    sampler=Segments(
        width=16, depth=8, segment_tokens=24, branching=(2,), initial=(2, 8), stopping=StopRules(boxed="ended", repetition="first")
    ),
    shaping=Outcome(right=1.0, wrong=-1.0, overlong_tokens=16),
    filter=GroupFilter(refill_rounds=2),
    credit=Ancestors(),
    loss=PolicyLoss(clip_low=0.2, clip_high=0.28, dual_clip=10.0),
    optim=Optim(lr=2e-4, warmup_steps=3),
    schedule=Schedule(steps=40, problems_per_step=24, mini_batches=2),
)
