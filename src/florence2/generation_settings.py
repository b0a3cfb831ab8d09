"""What a search setting may be: one table for requests and for a checkpoint's own files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from florence2.errors import RequestError, shown
from florence2.records import GenerationSettings
from florence2.tokens import BOS_ID, DECODER_START_ID, EOS_ID

MAX_BEAMS: Final = 32

LENGTH_PENALTY_RANGE: Final = (-1.0, 10.0)


def _is_penalty(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    low, high = LENGTH_PENALTY_RANGE
    return low <= value <= high


def _is_early_stopping(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value == "never")


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, slots=True)
class SettingRule:
    """What a search setting may be, in code and in words."""

    allows: Callable[[object], bool]
    says: str
    hint: str


SETTING_RULES: Final = {
    "num_beams": SettingRule(
        lambda value: _is_int(value, 1, MAX_BEAMS),
        f"a whole number from 1 to {MAX_BEAMS}",
        "use 1 for speed or 3 as published",
    ),
    "max_new_tokens": SettingRule(
        lambda value: value is None or _is_int(value, 1),
        "a whole number of at least 1",
        "leave it out to take the task's own budget",
    ),
    "length_penalty": SettingRule(
        _is_penalty,
        f"a number from {LENGTH_PENALTY_RANGE[0]:g} to {LENGTH_PENALTY_RANGE[1]:g}",
        "use 1 as published",
    ),
    "early_stopping": SettingRule(
        _is_early_stopping, 'true, false or "never"', "use true as published"
    ),
    "no_repeat_ngram_size": SettingRule(
        lambda value: _is_int(value, 0),
        "a whole number of at least 0",
        "use 0 to switch the ban off or 3 as published",
    ),
}
"""The one table of limits: for requests and for a checkpoint's own files."""

LIBRARY_DEFAULTS: Final = {
    "num_beams": 1,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}
"""What transformers means by a setting that a ``generation_config.json`` leaves out."""

# What a checkpoint may ask for and this search has not, with the values that ask for nothing:
# an answer is never shorter than the start token and <s>.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "do_sample": (False,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0, 1, 2),
    "min_new_tokens": (0, 1),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ([], {}),
    "forced_decoder_ids": ([],),
    "forced_bos_token_id": (BOS_ID,),
    "forced_eos_token_id": (EOS_ID, [EOS_ID]),
    "eos_token_id": (EOS_ID, [EOS_ID]),
    "decoder_start_token_id": (DECODER_START_ID,),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "num_return_sequences": (1,),
    "prompt_lookup_num_tokens": (0,),
}

_OF_SAMPLING: Final = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def unheeded(section: Mapping[str, Any]) -> str:
    """What a checkpoint's settings ask for that no search here does, as a list; "" for nothing.

    What only shapes sampling counts where sampling is asked for, as in transformers.
    """
    wanted = {
        key: value
        for key, neutral in _NEUTRAL.items()
        if (value := section.get(key)) is not None and value not in neutral
    }
    if "do_sample" in wanted:
        wanted |= {
            key: value
            for key, neutral in _OF_SAMPLING.items()
            if (value := section.get(key)) is not None and value != neutral
        }
    return ", ".join(f"{key} {shown(value)}" for key, value in wanted.items())


def check_settings(settings: GenerationSettings) -> None:
    """Raise ``RequestError`` if a setting is outside what the search supports."""
    for name, rule in SETTING_RULES.items():
        value = getattr(settings, name)
        if not rule.allows(value):
            raise RequestError(f"{name} must be {rule.says}, not {shown(value)}; {rule.hint}.")


def check_vocabulary(vocab: int, beams: int) -> None:
    """RequestError for more beams than the vocabulary has candidates for."""
    if 2 * beams >= vocab:
        raise RequestError(
            f"num_beams must be below half of the vocabulary of {vocab} tokens, not {beams}; "
            "use fewer beams."
        )
