"""TreeRPO: Tree Relative Policy Optimization.

Paper      Yang et al., arXiv 2506.05183v2.
Objective  Full N-ary tree of fixed-size steps; V(leaf) = R in {0, 1}, V(node) = mean of its children's V;
           A_c = (V_c - mu) / (mu (1 - mu) + 1e-6) among the children c of one parent, mu their mean (eq. 4), on the tokens of step c
           only; sibling groups with max V - min V < 0.1 are dropped (eq. 1-2);
           L = - mean over tokens of min(r A, clip(r, 1 - e, 1 + e) A) + 0.001 KL_k3(pi || ref) - 0.001 H(pi), e = 0.2.
Denominator  the tokens of all kept steps of the mini-batch, each once (token mean): a row is one node.
Differs    eq. 5 averages per step and then over steps; the token mean is that of the released code, there per micro-batch. Branching
           4 instead of 8 and temperature 1 instead of 0.6 on the embedded job; `--preset treerpo-paper` has the paper's.
           A range of exactly 0.1 is kept, as in the code (the paper: above 0.1 only). The code samples whole answers and cuts them
           (`--sampler.continuation`): the same trees in distribution.
Scale      mu (1 - mu) is the variance of a binary group, not its std: rewards 0 0 1 1 give -+2, one right of eight gives 8 and -8/7.
           The paper says that this keeps GRPO's scale; it does not, it weights rare successes by 1 / mu. `adv_norm` has the std
           (bernoulli_std), the group's own std and none.
Weights    Nodes enter once, so a level weighs by its number of nodes and the gradient of a tree is not its chains'.
           `unit_weights` leaves or branches makes it so (OPTS-TTPO, arXiv 2609.40035).
Uncertain  the clip range (the paper leaves it open; 0.2 is its framework's default).
"""

from rlzoo.algorithm import Algorithm, Optim, Schedule
from rlzoo.credit.siblings import Siblings
from rlzoo.losses.policy import PolicyLoss
from rlzoo.sampling.nary import Nary

algorithm = Algorithm(
    name="treerpo",
    card=__doc__,
    sampler=Nary(branching=4, segment_tokens=(20, 20, 152)),
    credit=Siblings(adv_norm="bernoulli_var", prune_metric="range", prune_tau=0.1),
    loss=PolicyLoss(kl_coef=0.001, entropy_coef=0.001),
    optim=Optim(lr=2e-4, warmup_steps=3),
    schedule=Schedule(steps=40, problems_per_step=24, mini_batches=2),
)
