"""What models do with a value on its way: moves, factors, writes in place, casts, hooks."""

from __future__ import annotations

# {a}: the width, {s}: the number of the statement; {{0}}: what is read, {{1}}: another value.
Edit = tuple[tuple[str, ...], dict[str, str]]


def _edit(*lines: str, **made: str) -> Edit:
    return lines, made


PERMUTATION, VECTOR = "torch.randperm({a})", "torch.ones({a})"

# Features or tokens in other places: a gain moves with them.
MOVES: tuple[Edit, ...] = (
    _edit("{out} = {{0}}[..., self.i{s}]", i=PERMUTATION),
    _edit("{out} = {{0}}.index_select(-1, self.i{s})", i=PERMUTATION),
    _edit("{out} = torch.gather({{0}}, -1, self.i{s}.expand_as({{0}}))", i=PERMUTATION),
    _edit("{out} = {{0}}.flip(-1)"),
    _edit("{out} = torch.roll({{0}}, 1, -1)"),
    _edit("{out} = torch.roll({{0}}, 1, 1)"),
    _edit("{out} = torch.cat({{0}}.chunk(2, -1)[::-1], -1)"),
    _edit("{out} = torch.cat([{{0}}[..., 1:], {{0}}[..., :1]], -1)"),
    _edit("{out} = {{0}}.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)"),
    _edit("{out} = {{0}}.reshape(*{{0}}.shape[:-1], -1, 2).flip(-1).reshape({{0}}.shape)"),
    _edit("{out} = torch.stack([{{0}}[..., ::2], {{0}}[..., 1::2]], -1).flatten(-2)"),
    _edit("{out} = torch.stack({{0}}.unbind(-1)[::-1], -1)"),
    _edit("{out} = {{0}}.unflatten(-1, (2, -1)).movedim(-2, -1).reshape({{0}}.shape)"),
    _edit("{out} = {{0}}.transpose(0, 1).contiguous().transpose(0, 1)"),
    _edit("{out} = {{0}}.flip(1)"),
    _edit("{out} = {{0}}.reshape(-1, {a}).clone().view({{0}}.shape)"),
    _edit("{out} = {{0}}.unsqueeze(2).expand(-1, -1, 3, -1).mean(2)"),
    _edit("{out} = F.pad({{0}}, (1, 0))[..., :-1]"),
    _edit("{out} = F.pad({{0}}, (0, 0, 1, 0))[:, :-1]"),
    _edit("{out} = {{0}}.repeat(1, 1, 2)[..., 1 : {a} + 1]"),
    _edit("{out} = {{0}}.repeat_interleave(2, -1)[..., :{a}]"),
    _edit("{out} = {{0}}.as_strided({{0}}.shape, {{0}}.stride())"),
    _edit("{out} = {{0}}.mT.contiguous().mT"),
    _edit("{out} = torch.take_along_dim({{0}}, self.i{s}.view(1, 1, -1), -1)", i=PERMUTATION),
    _edit(
        "{out} = {{0}}.swapaxes(0, 1).flatten(0, 1).unflatten(0, {{0}}.shape[1::-1]).swapaxes(0, 1)"
    ),
)
# Numbers, vectors and functions: some a gain passes, most it does not.
FACTORS: tuple[Edit, ...] = (
    _edit(
        "{out} = {{0}} * self.u{s} + torch.cat([-{{0}}[..., {a} // 2 :], "
        "{{0}}[..., : {a} // 2]], -1) * self.v{s}",
        u=VECTOR,
        v=VECTOR,
    ),
    _edit("{out} = torch.fft.rfft({{0}}, n={{0}}.shape[1] * 2, dim=1).real[:, : {{0}}.shape[1]]"),
    _edit("{out} = {{0}}.sort(1).values"),
    _edit("{out} = {{0}}.amax(1, keepdim=True) + {{0}} * 0"),
    _edit("{out} = {{0}}.unfold(1, 1, 1).squeeze(-1)"),
    _edit("{out} = torch.where({{0}}.mean(-1, keepdim=True) > 0, {{0}}, 2 * {{0}})"),
    _edit("{out} = {{0}}.tril()"),
    _edit("{out} = F.normalize({{0}}, dim=-1)"),
    _edit("{out} = {{0}} / {{0}}.norm(dim=-1, keepdim=True)"),
    _edit("{out} = self.d{s}({{0}}.mT).mT", d="nn.GroupNorm(2, {a})"),
    _edit("{out} = self.d{s}({{0}}.mT).mT", d="nn.BatchNorm1d({a})"),
    _edit("{out} = self.d{s}({{0}}.mT).mT", d="nn.GroupNorm(1, {a})"),
    _edit("{out} = {{0}} * 0.7"),
    _edit("{out} = -{{0}} / 3"),
    _edit("{out} = {{0}} * self.u{s}", u=VECTOR),
    _edit("{out} = {{0}} / self.u{s}", u=VECTOR),
    _edit("{out} = {{0}} * self.p{s}", p="nn.Parameter(torch.ones({a}))"),
    _edit("{out} = {{0}} * self.p{s}", p="nn.Parameter(torch.ones(1))"),
    _edit("{out} = {{0}} + self.u{s}", u=VECTOR),
    _edit("{out} = {{0}} + self.p{s}", p="nn.Parameter(torch.zeros({a}))"),
    _edit("{out} = {{0}} + 0.1"),
    _edit("{out} = {{0}} + {{0}}"),
    _edit("{out} = {{0}} + {{0}}.flip(-1)"),
    _edit("{out} = {{0}} - {{0}}.mean(1, keepdim=True)"),
    _edit("{out} = {{0}} - {{0}}.mean(-1, keepdim=True)"),
    _edit("{out} = {{0}} * torch.sigmoid({{0}}.mean(-1, keepdim=True))"),
    _edit("{out} = {{0}} * {{0}}"),
    _edit("{out} = F.relu({{0}})"),
    _edit("{out} = torch.tanh({{0}})"),
    _edit("{out} = F.gelu({{0}})"),
    _edit("{out} = {{0}}.clamp(-1, 1)"),
    _edit("{out} = {{0}}.abs()"),
    _edit("{out} = torch.softmax({{0}}, -1)"),
    _edit("{out} = F.dropout({{0}}, 0.5, self.training)"),
    _edit("{out} = self.d{s}({{0}})", d="nn.Dropout(0.3)"),
    _edit("{out} = self.d{s}({{0}})", d="nn.Identity()"),
    _edit("{out} = {{0}}.float().to({{0}}.dtype)"),
    _edit("{out} = {{0}}.detach()"),
    _edit("{out} = {{0}}.cumsum(1)"),
    _edit("{out} = {{0}}.cumsum(-1)"),
    _edit("{out} = torch.lerp({{0}}, {{0}}.roll(1, 1), 0.3)"),
    _edit("{out} = torch.lerp({{0}}, {{0}}.roll(1, 1), self.u{s})", u=VECTOR),
    _edit("{out} = torch.where(self.u{s} > 1, {{0}}, 0)", u=VECTOR),
    _edit("{out} = torch.where(self.u{s} > 1, {{0}}, {{0}}.flip(-1))", u=VECTOR),
    _edit("{out} = {{0}}.masked_fill(self.u{s} > 1, 0)", u=VECTOR),
    _edit("{out} = {{0}}.masked_fill(self.u{s} > 1, 0.5)", u=VECTOR),
    _edit("{out} = {{0}} * {{0}}.new_ones({{0}}.shape[1], 1).cumsum(0)"),
    _edit("{out} = {{0}}.triu(-1)"),
    _edit("{out} = torch.addcmul({{0}}, {{0}}, self.u{s}, value=0.5)", u=VECTOR),
    _edit(
        "{out} = {{0}}.unflatten(-1, (2, -1)).sum(-2, keepdim=True).expand(-1, -1, 2, -1)"
        ".flatten(-2)"
    ),
)
# Two values that meet.
MEETINGS: tuple[Edit, ...] = (
    *[_edit("{out} = {{0}} + {{1}}")] * 2,
    _edit("{out} = {{0}} * {{1}}"),
    _edit("{out} = {{0}} * torch.sigmoid({{1}})"),
    _edit("{out} = {{0}} * {{1}}.mean(-1, keepdim=True)"),
    _edit("{out} = torch.cat([{{0}}[..., : {a} // 2], {{1}}[..., {a} // 2 :]], -1)"),
    _edit("{out} = torch.where(self.u{s} > 1, {{0}}, {{1}})", u=VECTOR),
    _edit("{out} = torch.lerp({{0}}, {{1}}, 0.25)"),
    _edit("{out} = torch.softmax({{1}} @ {{1}}.mT, -1) @ {{0}}"),
    _edit("{out} = {{0}} - {{1}}"),
    _edit("{out} = torch.cat([{{0}}, {{1}}], 1)[:, : {{0}}.shape[1]]"),
)
# Written in place: `out` is another name for what was read, or a part of it.
WRITES: tuple[Edit, ...] = (
    _edit("{out} = {{0}}.mul_(0.5)"),
    _edit("{out} = {{0}}.mul_(self.u{s})", u=VECTOR),
    _edit("{out} = {{0}}.add_(self.u{s})", u=VECTOR),
    _edit("{out} = {{0}}.copy_({{0}}.flip(-1))"),
    _edit("{out} = {{0}}", "{out}[..., :2] = 0"),
    _edit("{out} = {{0}}", "{out}[..., 1:3] *= 2"),
    _edit("{out} = {{0}}", "{out}[:, 1:] += {out}[:, :-1].clone()"),
    _edit("{out} = {{0}}", "{out}[..., :2] = {out}[..., 2:4].clone()"),
    _edit("{out} = {{0}}", "{out}[:, 0] = self.u{s}", u=VECTOR),
    _edit("{out} = {{0}}", "{out}.unflatten(-1, (2, -1))[..., 0, :].mul_(3)"),
    _edit("{out} = {{0}}.clone()", "{out}[{{0}}.sum(-1) > 0] *= 2"),
    _edit("{out} = {{0}}.clone()", "{out}[{{0}} > 0] *= 2"),
    _edit("{out} = {{0}}.clone()", "{out}[..., 0], {out}[..., 1] = {{0}}[..., 1], {{0}}[..., 0]"),
    _edit("{out} = {{0}}", "{out}.transpose(0, 1)[0] += 1"),
    _edit("{out} = {{0}}", "{out}.unbind(-1)[0].mul_(2)"),
    _edit("{out} = {{0}}.add({{0}}.detach().mul_(2))"),
    _edit("{out} = {{0}}", "{out}.swapaxes(1, 2).flip(1).add_(1)"),
    _edit("{out} = {{0}}", "{out}.select(1, 0).copy_({out}.select(1, -1) * 2)"),
    _edit("{out} = {{0}}", "{out}.data.mul_(1.5)"),
    _edit("{out} = {{0}}", "{out}.mT.mul_(2)"),
    _edit("{out} = {{0}}.clone()", "{out}.view(-1, {a})[:, 1].zero_()"),
    _edit("{out} = torch.zeros_like({{0}})", "{out}.copy_({{0}})"),
    _edit("{out} = torch.empty_like({{0}})", "{out}[..., self.i{s}] = {{0}}", i=PERMUTATION),
    _edit("{out} = torch.zeros_like({{0}})", "{out}[..., 1:] = {{0}}[..., :-1]"),
    _edit("{out} = torch.zeros_like({{0}})", "{out}[:, 1:] = {{0}}[:, :-1]"),
    _edit("{out} = {{0}}.new_zeros({{0}}.shape).index_add_(-1, self.i{s}, {{0}})", i=PERMUTATION),
    _edit(
        "{out} = {{0}}.new_zeros({{0}}.shape).scatter_(-1, self.i{s}.expand_as({{0}}), {{0}})",
        i=PERMUTATION,
    ),
    _edit("{out} = {{0}}.new_zeros({{0}}.shape)", "torch.mul({{0}}, 2, out={out})"),
    _edit("{out} = {{0}}.masked_fill_(self.u{s} > 1, 0)", u=VECTOR),
    _edit("{out} = F.relu({{0}}, inplace=True)"),
    _edit("{out} = {{0}}.transpose_(1, 2).transpose_(1, 2)"),
)
WRITES_OF_TWO: tuple[Edit, ...] = (
    _edit("{out} = {{0}}.add_({{1}})"),
    _edit("{out} = {{0}}.mul_({{1}})"),
    _edit("{out} = {{0}}.copy_({{1}})"),
    _edit("{out} = {{0}}", "{out}[..., :2] = {{1}}[..., :2]"),
    _edit("{out} = {{0}}", "{out}[..., 1:] += {{1}}[..., 1:]"),
    _edit("{out} = {{0}}.lerp_({{1}}, 0.5)"),
    _edit("{out} = torch.add({{0}}, {{1}}, out={{0}})"),
)
# Hooks of a module; they see its output `o`.
HOOKS = (
    "register_forward_hook(lambda m, i, o: o * 1.5)",
    "register_forward_hook(lambda m, i, o: o + 0.25)",
    "register_forward_hook(lambda m, i, o: o + i[0].mean(-1, keepdim=True))",
    "register_forward_hook(lambda m, i, o: o.flip(-1))",
    "register_forward_hook(lambda m, i, o: o.mul_(2))",
    "register_forward_hook(lambda m, i, o: None)",
    "register_forward_hook(lambda m, i, o: torch.tanh(o))",
    "register_forward_pre_hook(lambda m, i: (i[0] * 2,))",
    "register_forward_pre_hook(lambda m, i: (i[0].flip(1),))",
    "register_forward_pre_hook(lambda m, i: (i[0] + 1,))",
)
# A hook that writes where no version is counted.
SILENT_HOOKS = (
    "register_forward_hook(lambda m, i, o: (o.data.add_(0.5), None)[1])",
    "register_forward_hook(lambda m, i, o: (o.detach().mul_(1.5), None)[1])",
)
