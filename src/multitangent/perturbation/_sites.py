"""Sites: the places in a model whose outputs are perturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Site:
    """One or several modules that run one after another, and are one layer to the perturbation.

    Attributes:
        name: The name of the first module in the model.
        modules: The modules in the order in which they run.
    """

    name: str
    modules: tuple[nn.Module, ...]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the site, each once."""
        parameters = {id(p): p for m in self.modules for p in m.parameters() if p.requires_grad}
        return list(parameters.values())


def find_sites(model: nn.Module, names: Sequence[str] | None = None) -> list[Site]:
    """The sites of a model: the named ones, or the default.

    The default depends on the model. A site of an ``nn.Sequential`` is a child with trainable
    parameters, together with the parameter-free ones after it. A model that repeats blocks, such as
    a transformer, has the trainable blocks as sites, and also the first block if something before
    it is trained. In other models a site is a module that has trainable parameters of its own and
    none in modules inside it. PyTorch's own modules that have both (attention) are whole sites.

    Raises:
        ValueError: If a name is unknown, a site lies inside another, or there is none.
        TypeError: If a trainable parameter is complex.
    """
    if isinstance(names, str):
        raise ValueError(
            f"`sites` should be a sequence of names. Found the text {names!r}. Try [{names!r}]."
        )
    if names is not None:
        sites = [Site(name, (_module(model, name),)) for name in names]
    elif isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        sites = _groups(model)
    else:
        sites = _blocks(model) or _layers(model)
    _check(model, sites)
    return sites


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _blocks(model: nn.Module) -> list[Site]:
    """The blocks that a model repeats; none if it has no list of them, or if it convolves."""
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if _repeats(module) and not inside:
            lists += _innermost(name, module)
    modules = dict(model.named_modules())
    return [
        Site(f"{name}.{number}", (block,))
        for name in lists
        for index, (number, block) in enumerate(modules[name].named_children())
        if _is_trainable(block) or (index == 0 and _follows_trained(model, name, lists))
    ]


def _follows_trained(model: nn.Module, name: str, lists: Sequence[str]) -> bool:
    """Whether something that no block holds is trained before a list of blocks.

    The first block is then a site, even if it is frozen. Otherwise the graph of what is trained
    would go on through all frozen blocks to the first one that is trained.
    """
    for found, parameter in model.named_parameters():
        if found.startswith(f"{name}."):
            return False
        if parameter.requires_grad and not any(found.startswith(f"{other}.") for other in lists):
            return True
    return False


def first_block(model: nn.Module) -> str | None:
    """The name of the first of the blocks that a model repeats, frozen or not, if it has any."""
    for name, module in model.named_modules():
        blocks = list(module.children())
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(blocks) > 1
            and len({type(block) for block in blocks}) == 1
            and _is_block(blocks[0])
        ):
            return f"{name}.{next(iter(module._modules))}"
    return None


def _innermost(name: str, blocks: nn.Module) -> list[str]:
    """A list of blocks, or those that its members consist of, as stages do of blocks."""
    nested = [f"{name}.{n}" for n, b in blocks.named_children() if type(b) is nn.ModuleList]
    if nested:  # lists are never called
        return nested
    inner = [
        f"{name}.{number}.{child}"
        for number, block in blocks.named_children()
        for child, module in block.named_children()
        if _repeats(module, kinds=1)
    ]
    return inner or [name]


def _repeats(module: nn.Module, kinds: int | None = None) -> bool:
    """Whether a module is a list of blocks of few kinds, each of several layers.

    Args:
        module: The module.
        kinds: How many kinds there may be, by default half as many as blocks.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    blocks = [block for block in module.children() if _is_trainable(block)]
    most = len(blocks) // 2 if kinds is None else kinds
    return (
        len(blocks) > 1 and len({type(b) for b in blocks}) <= most and all(map(_is_block, blocks))
    )


def _is_block(module: nn.Module) -> bool:
    """Whether a module has several trainable layers, and is none of a network of convolutions."""
    parts = [
        part for part in module.modules() if next(part.parameters(recurse=False), None) is not None
    ]
    return len(parts) > 1 and not any(isinstance(part, _OF_IMAGES) for part in parts)


_OF_IMAGES = (nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)


def _layers(model: nn.Module) -> list[Site]:
    sites: list[Site] = []
    for name, module in model.named_modules():
        if not _is_trainable(module) or any(name.startswith(f"{site.name}.") for site in sites):
            continue
        owner = any(p.requires_grad for p in module.parameters(recurse=False))
        of_torch = type(module).__module__.startswith("torch.nn.")
        if owner and (of_torch or not any(_is_trainable(child) for child in module.children())):
            sites.append(Site(name, (module,)))
    return sites


def _groups(model: nn.Sequential) -> list[Site]:
    groups: list[tuple[str, list[nn.Module]]] = []
    for name, child in model._modules.items():  # a module may stand in several places
        assert child is not None
        if _is_trainable(child):
            groups.append((name, [child]))
        elif groups:
            groups[-1][1].append(child)
    return [Site(name, tuple(modules)) for name, modules in groups]


def _module(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(
            f"`sites` should name modules of the model. Found {name!r}, which is none of "
            f"{sorted(modules)}."
        )
    return modules[name]


def _check(model: nn.Module, sites: Sequence[Site]) -> None:
    owner: dict[int, str] = {}
    for site in sites:
        for module in {id(m): m for part in site.modules for m in part.modules()}.values():
            if next(module.parameters(recurse=False), None) is None:
                continue
            if owner.setdefault(id(module), site.name) != site.name:
                raise ValueError(
                    "`sites` should not lie inside one another. Found a module that belongs to "
                    f"both {owner[id(module)]!r} and {site.name!r}. Try "
                    "`Activations(sites=[...])` with modules that hold nothing in common, or "
                    "`perturb='weights'`."
                )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise TypeError(
                "Trainable parameters should be real: only those have directional derivatives "
                f"here. Found {name} of {parameter.dtype}. Try real and imaginary part as "
                "parameters of their own."
            )
    if not sites:
        raise ValueError(
            "`model` should have trainable parameters. Found none: nothing would be trained. Try "
            "`requires_grad_(True)` on the parameters that should be."
        )
