"""TreeRPO: Tree Relative Policy Optimization.

Paper      Yang et al., arXiv 2506.05183.
Objective  Full N-ary tree of fixed-size steps; V(leaf) = R in {0, 1}, V(node) = mean of its children's V;
           A_c = (V_c - mu) / sqrt(mu (1 - mu)) among the children c of one parent, mu their mean, on the tokens of step c only;
           sibling groups with std V < 0.1 are dropped;
           L = - mean over tokens of min(r A, clip(r, 1 - e, 1 + e) A)  [+ beta KL_k3(pi || ref)], e = 0.2.
Denominator  the tokens of all kept steps of the mini-batch, each once (token mean): a row is one node.
Differs    beta is 0 by default (a KL term is in the paper's objective; its weight is not known). Branching 4 instead of 8
           on the embedded job.
Uncertain  reconstructed normalisation: the paper's "advantage re-normalisation" was not found in any public source;
           `adv_norm` = bernoulli_std is the best-supported reading, bernoulli_var, group_std and none are the others. What the
           threshold 0.1 is compared with (`prune_metric`), learning rate, batch size and KL weight were not found either.
"""

from rlzoo.algorithm import Algorithm, Optim, Schedule
from rlzoo.credit.siblings import Siblings
from rlzoo.sampling.nary import Nary

algorithm = Algorithm(
    name="treerpo",
    card=__doc__,
    sampler=Nary(branching=4, segment_tokens=(20, 20, 152)),
    credit=Siblings(),
    optim=Optim(lr=2e-4, warmup_steps=3),
    schedule=Schedule(steps=40, problems_per_step=24, mini_batches=2),
)
