"""GRPO: Group Relative Policy Optimization.

Paper      Shao et al., DeepSeekMath, arXiv 2402.03300.
Objective  G independent responses per problem; A_i = (R_i - mean R) / (std R + 1e-6), on every token of response i;
           L = - mean over tokens of min(r A, clip(r, 1 - e, 1 + e) A)  [+ beta KL_k3(pi || ref)],
           r = pi(token) / pi_old(token), e = 0.2;
           groups that are all right or all wrong carry no signal and are dropped.
Denominator  all response tokens of the mini-batch (token mean), advantages scaled by the unbiased std of the group.
Differs    The paper averages per response and then over responses; the token mean of later work is the default here
           (`--loss.aggregation sequence_mean` is the paper's). beta is 0 by default (paper: 0.04). A response that ends
           without end-of-text is graded as it stands.
Uncertain  nothing of weight.
"""

from rlzoo.algorithm import Algorithm, Optim, Schedule
from rlzoo.credit.group import Group
from rlzoo.sampling.chains import Chains

algorithm = Algorithm(
    name="grpo",
    card=__doc__,
    sampler=Chains(group_size=16, max_response_tokens=192),
    credit=Group(),
    optim=Optim(lr=2e-4, warmup_steps=3),
    schedule=Schedule(steps=40, problems_per_step=32, mini_batches=2),
)
