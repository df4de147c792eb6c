"""A two-layer attention flow with hand-written programs: what the compiler would emit for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from specdiff.options import Options
from specdiff.program import CacheSlot, Denoised, Evaluation, InputSpec, Segment, Signature
from specdiff.runtime.step.dispatch import Runtime

UNCORRECTED = {"ablation": {"correction": False}}
SIDE, CHANNELS, WIDTH, LAYERS, TEXT = 4, 3, 8, 2, 3
N = SIDE * SIDE
NAMES = ("embed", "text", "clock", "qkv", "out")


class Toy(nn.Module):
    """velocity(latent [B, C, H, W], time [B], prompt [B, T, D]) by a compiled graph's callable."""

    def __init__(self, runtime: Callable[..., list[Tensor]], seed: int = 0) -> None:
        super().__init__()
        self.runtime = runtime
        generator = torch.Generator().manual_seed(seed)
        shapes = ((CHANNELS, WIDTH), (WIDTH, WIDTH), (WIDTH,), (LAYERS, 3, WIDTH, WIDTH))
        for name, shape in zip(NAMES, (*shapes, (WIDTH, CHANNELS)), strict=True):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) / 4))

    def forward(self, latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        return self.runtime(*self.parameters(), latent, time, prompt, 4.0)[0]


class ToyPrograms:
    """The four programs, eager, with every call logged as (name, active tokens or None).

    A dense call that is given the scratch set is logged by that name.
    """

    compile_seconds: Mapping[str, float] = {"dense": 1.0, "selective": 2.0}

    def __init__(
        self, batch: int = 1, *, time: bool = True, sign: float = 1.0, unit: float = 1.0,
        rising: bool = False,
    ) -> None:  # fmt: skip
        roles = {"latent": "latent", "time": "time" if time else "condition"}
        names = (*NAMES, "latent", "time", "prompt", "gain")
        self.sign, self.unit, self.rising = sign, unit, rising
        self.calls: list[tuple[str, Tensor | None]] = []
        self.texts: list[bool] = []
        self.passing: list[tuple[Tensor, Tensor]] = []
        """Latent and time of dense evaluations that leave no caches."""
        self._buffers: dict[str, Evaluation] = {}
        slot = CacheSlot("kv", (batch, N, 2, WIDTH), torch.float32, torch.device("cpu"))
        tokens = CacheSlot("tokens", (batch, N, CHANNELS), torch.float32, torch.device("cpu"))
        self.signature = Signature(
            inputs=tuple(
                InputSpec(i, name, "parameter" if name in NAMES else roles.get(name, "condition"))
                for i, name in enumerate(names)
            ),
            segments=(Segment("image", N, True), Segment("text", TEXT, False)),
            caches=(slot,) * LAYERS,
            tokens=tokens,
            lengths=(N,),
            denoised=(Denoised(5, 0),),
            time=6 if time else None,
            additive=True,
        )

    def probe(self, inputs: Sequence[object]) -> Tensor:
        self.calls.append(("probe", None))
        return self._in_buffers("probe", self._run(inputs, None, None)).tokens

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        scratch = len({cache.data_ptr() for cache in caches}) == 1
        self.calls.append(("scratch" if scratch else "dense", None))
        if scratch:
            self.passing.append((inputs[5], inputs[6]))
        return self._in_buffers("dense", self._run(inputs, caches, None))

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        self.calls.append(("selective", active))
        self.texts.append(text)
        found = self._in_buffers("selective", self._run(inputs, caches, active))
        return found if importance else Evaluation(found.tokens)

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        return [tokens.mT.reshape(len(tokens), CHANNELS, SIDE, SIDE)]  # may be a view

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _in_buffers(self, name: str, evaluation: Evaluation) -> Evaluation:
        """Overwrite what the program returned before, as CUDA graphs do."""
        if name in self._buffers and self._buffers[name].tokens.shape == evaluation.tokens.shape:
            self._buffers[name].tokens.copy_(evaluation.tokens)
            self._buffers[name].importance.copy_(evaluation.importance)
        else:
            with torch.inference_mode(False):
                copies = evaluation.tokens.clone(), evaluation.importance.clone()
            self._buffers[name] = Evaluation(*copies)
        return self._buffers[name]

    def _run(
        self, inputs: Sequence[object], caches: Sequence[Tensor] | None, active: Tensor | None
    ) -> Evaluation:
        embed, text, clock, qkv, out, latent, time, prompt, gain = inputs
        batch = len(latent)
        sigma = time.float() / self.unit
        sigma = 1 - sigma if self.rising else sigma
        everything = torch.arange(N).expand(batch, N)
        rows = (everything if active is None else active).unsqueeze(-1)
        pixels = latent.flatten(2).mT
        pixels = pixels.gather(1, rows.expand(-1, -1, CHANNELS))
        image = pixels @ embed + torch.sin(sigma.reshape(-1, 1, 1) + clock)
        words = prompt @ text
        received = torch.zeros(batch, N)
        for layer in range(LAYERS):
            q, k, v = (torch.cat([words, image], 1) @ qkv[layer].flatten(0, 1).T).chunk(3, -1)
            kv = torch.stack([k[:, TEXT:], v[:, TEXT:]], 2)
            if caches is not None:
                caches[layer].scatter_(1, rows.unsqueeze(-1).expand(-1, -1, 2, WIDTH), kv)
                kv = caches[layer]
            keys, values = kv.unbind(2)
            keys, values = (torch.cat(p, 1) for p in ((k[:, :TEXT], keys), (v[:, :TEXT], values)))
            weights = (gain * q @ keys.mT / WIDTH**0.5).softmax(-1)
            received += weights[:, :, TEXT:].sum(1)
            mixed = weights @ values
            words, image = words + mixed[:, :TEXT], image + mixed[:, TEXT:]
        return Evaluation(self.sign * (pixels - torch.tanh(image @ out)), received)


def toy(seed: int = 0, *, programs: ToyPrograms | None = None, **options: object) -> Toy:
    """A compiled toy model."""
    return Toy(Runtime(programs or ToyPrograms(), Options(**options)), seed)


def dense_velocity(model: Toy, latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
    """What the untouched model would return; logs nothing."""
    reference = model.runtime.programs
    inputs = [*model.parameters(), latent, time, prompt, 4.0]
    with torch.no_grad():
        return reference.tail(inputs, reference._run(inputs, None, None).tokens)[0]


def noise(seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randn(
        batch, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + 100)
    )


def prompt(seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randn(batch, TEXT, WIDTH, generator=torch.Generator().manual_seed(seed + 200))


def sigmas(steps: int) -> list[float]:
    """Shift 3, from 1 to 0; `steps` + 1 values, exact in float32."""
    uniform = torch.linspace(1, 0, steps + 1)
    return (3 * uniform / (1 + 2 * uniform)).tolist()


class Euler:
    """One generation on a compiled toy, one step at a time, checked against the dense model."""

    def __init__(
        self, model: Toy, seed: int = 0, steps: int = 10, text: Tensor | None = None,
        batch: int = 1, as_time: Callable[[float], float] = lambda s: s,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.dtype, self.as_time = model, batch, dtype, as_time
        self.sigmas = sigmas(steps)
        self.index = 0
        self.latent = noise(seed, batch)
        self.prompt = prompt(seed, batch) if text is None else text
        self.errors: list[float] = []
        self.velocities: list[Tensor] = []

    def time(self, index: int | None = None) -> Tensor:
        value = self.as_time(self.sigmas[self.index if index is None else index])
        return torch.tensor(value, dtype=self.dtype).expand(self.batch)

    def step(self) -> Tensor:
        velocity = self.model(self.latent, self.time(), self.prompt)
        exact = dense_velocity(self.model, self.latent, self.time(), self.prompt)
        self.errors.append((velocity - exact).norm().item() / exact.norm().item())
        self.velocities.append(velocity)
        span = self.sigmas[self.index + 1] - self.sigmas[self.index]
        self.latent = self.latent + span * velocity * self.model.runtime.programs.sign
        self.index += 1
        return velocity

    def run(self, steps: int | None = None) -> Euler:
        for _ in range(len(self.sigmas) - 1 - self.index if steps is None else steps):
            self.step()
        return self


def streams_of(model: Toy) -> list:
    """The streams of the model outside sessions."""
    from specdiff.runtime.streams.registry import state_of

    state = state_of(model.parameters())
    return state.table(model.runtime)._streams
