"""A character tokenizer in Hugging Face format, for tasks that bring their own alphabet."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

MASK, EOS, PAD = "<mask>", "<eos>", "<pad>"


def char_tokenizer(alphabet: str, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, then <mask>, <eos>, <pad>; anything else is an error.

    Without `ends` there is no <eos> and no <pad>: responses of one length need neither, and a model cannot choose them.

    Decoding joins tokens without spaces, so text -> ids -> text is the identity.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*dict.fromkeys(alphabet), MASK, *((EOS, PAD) if ends else ())]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        **({"eos_token": EOS, "pad_token": PAD} if ends else {}),
    )
