"""Facts that change with library versions, each with its source, in one table."""

import re
from dataclasses import dataclass

from estimator.errors import RequestError

Version = tuple[int, ...]


def parse_version(field: str, text: str) -> Version:
    """`5.23.0` as (5, 23, 0); suffixes such as `+cpu`, `rc1`, `.dev0` are dropped.

    Raises:
        RequestError: if the text does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise RequestError(f"{field}: {text!r} is not a version; expected for instance '5.23.0'", field=field)
    return tuple(int(part) for part in match.group().split("."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The library versions to answer for; facts that follow from them are properties."""

    torch: Version = (2, 13, 0)
    transformers: Version = (5, 23, 0)
    peft: Version = (0, 21, 2)
    bitsandbytes: Version = (0, 50, 2)
    trl: Version = (1, 16, 0)

    @property
    def experts_are_modules(self) -> bool:
        """Whether MoE experts are lists of nn.Linear (quantized by bitsandbytes) and not fused parameters (left as they are).

        Source: transformers 5.0, modeling code of Mixtral, Qwen-MoE, DeepSeek, gpt-oss; integrations/bitsandbytes.py, replace_with_bnb_linear.
        """
        return self.transformers < (5,)
