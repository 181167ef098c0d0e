# %% exercise-count: forgets the biases
expert = 2 * 4 * C * C
total_and_active = (moe_size[0] + 2 * 56 * (expert + C), moe_size[1] + 2 * 56 * C)

# %% exercise-count: one layer only
expert = 2 * 4 * C * C + 5 * C
total_and_active = (moe_size[0] + 56 * (expert + C), moe_size[1] + 56 * C)

# %% exercise-count: a token meets all experts
expert = 2 * 4 * C * C + 5 * C
total_and_active = (moe_size[0] + 2 * 56 * (expert + C), moe_size[0] + 2 * 56 * (expert + C))


# %% exercise-two: only the best expert
class TwoExperts(MoE):
    pass


# %% exercise-two: gates divided by their sum
class TwoExperts(MoE):
    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates, choices = self.router(tokens).softmax(-1).topk(2)
        gates = gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for gate, choice in zip(gates.T, choices.T):
            for e, expert in enumerate(self.experts):
                chosen = (choice == e).nonzero().squeeze(1)
                y = y.index_add(0, chosen, gate[chosen, None] * expert(tokens[chosen]))
        return y.view_as(x)


# %% exercise-two: both experts weighed by the first gate
class TwoExperts(MoE):
    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates, choices = self.router(tokens).softmax(-1).topk(2)
        y = torch.zeros_like(tokens)
        for choice in choices.T:
            for e, expert in enumerate(self.experts):
                chosen = (choice == e).nonzero().squeeze(1)
                y = y.index_add(0, chosen, gates[chosen, :1] * expert(tokens[chosen]))
        return y.view_as(x)


# %% exercise-weight: too little to change anything
weight = 1e-5

# %% exercise-weight: so much that the router forgets its task
weight = 100.0
