"""Token ids as in generation: the prompt's untouched, one BOS, one EOS, and nothing shortened without being counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import pytest
import trl
from shared.runs import REAL_DATA
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.data import tokenizing
from utils.data.encoding import PromptEncoder
from utils.data.rendering import Rendered
from utils.data.tokenizing import PAIR_COLUMNS, PROMPT_SHARE_KEPT, SFT_COLUMNS, Truncation, fit_lengths, tokenize_rows
from utils.data.turns import split_transcript
from utils.errors import UserError
from utils.models.templates import read_chat_template, set_chat_template

REAL = {
    "gpt2": "tokenizers/gpt2",
    "minimind": "tokenizers/minimind_6400",
    "oasst": "tokenizers/oasst_tiny_783",
    "stories": "models/stories260K",
}

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
WORDS = ["a", "the", "dog", "Dogs", "run", "running", "to", "two", "yes", "No", "x1", "don't", "Hello", "world"]
GLUE = [" ", " ", " ", "  ", "\n", "\n\n", ". ", ", ", "-", "!", "? ", " \n", ":", ""]
LETTERS = ["▁", "\n", *map(chr, range(33, 127))]
CORPUS = [f"{a}{g}{b}{g}" for a in WORDS for b in WORDS for g in GLUE]


def wrap(tokenizer: Tokenizer, adds_bos: bool, eos: str = "</s>") -> PreTrainedTokenizerFast:
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def byte_level(adds_bos: bool) -> PreTrainedTokenizerFast:
    """As GPT-2's or Llama 3's: bytes, words with the space in front of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, adds_bos)


def unigram(adds_bos: bool) -> PreTrainedTokenizerFast:
    """As T5's: a space is put in front of a text's first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, adds_bos)


def llama_like(adds_bos: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's: no words, a space in front of a text and behind each special token, merges over line breaks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIAL, initial_alphabet=LETTERS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, adds_bos)


MADE = {
    "bytes": lambda: byte_level(adds_bos=False),
    "bytes-bos": lambda: byte_level(adds_bos=True),
    "unigram": lambda: unigram(adds_bos=False),
    "unigram-bos": lambda: unigram(adds_bos=True),
    "llama-bos": lambda: llama_like(adds_bos=True),
}
KEPT: dict[str, PreTrainedTokenizerBase] = {}


@pytest.fixture
def load():
    """A tokenizer by name, without the chat template that an earlier test gave it."""
    own = {}

    def load_one(name: str) -> PreTrainedTokenizerBase:
        if name not in KEPT:
            if name in REAL and not (REAL_DATA / REAL[name]).is_dir():
                pytest.skip(f"{REAL[name]} is not in DPO_REAL_DATA")
            KEPT[name] = MADE[name]() if name in MADE else AutoTokenizer.from_pretrained(REAL_DATA / REAL[name])
        own.setdefault(name, KEPT[name].chat_template)
        return KEPT[name]

    yield load_one
    for name, template in own.items():
        KEPT[name].chat_template = template


# Those that decode to the very text that they encoded, and add nothing to it.
EXACT = ("bytes", "gpt2", "minimind", "oasst")

ALL = pytest.mark.parametrize("name", [*MADE, *REAL])
WITHOUT_TEMPLATE = pytest.mark.parametrize("name", [*MADE, "gpt2", "oasst", "stories"])

LOOP = "{%- for m in messages -%}"
# Ends a turn with <|im_end|> and a line break, as Qwen's.
CHATML = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# In front of a reply to come stands an empty think block, in front of one that is there nothing.
THINK = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")
# Writes its own BOS, and the EOS behind each reply.
LLAMA = (
    "{{ bos_token }}" + LOOP + "{%- if m['role'] == 'assistant' -%}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{%- else -%}{{ '[INST] ' + m['content'] + ' [/INST]' }}{%- endif -%}{%- endfor -%}"
)
# Ends no turn at all.
BARE = (
    LOOP + "{{ m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
)
TEMPLATES = {"chatml": CHATML, "think": THINK, "llama": LLAMA, "bare": BARE}


def random_text(draw: random.Random, most_words: int = 12, letters: bool = True) -> str:
    """Words joined by all sorts of blanks; never only blanks."""
    text = "".join(draw.choice(WORDS) + draw.choice(GLUE) for _ in range(draw.randint(1, most_words)))
    if letters and draw.random() < 0.3:
        text += draw.choice(["é", "漢字", "🙂", "naïve "])
    return draw.choice(["", "", " ", "\n", "<"]) + text


def random_prompt(draw: random.Random, letters: bool) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": random_text(draw, 4, letters)}] if draw.random() < 0.3 else []
    for role in ["user", "assistant"] * draw.randint(0, 2):
        turns.append({"role": role, "content": random_text(draw, 6, letters)})
    return [*turns, {"role": "user", "content": random_text(draw, 8, letters)}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def knows_all_letters(name: str) -> bool:
    return name not in ("unigram", "unigram-bos", "llama-bos")


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def spaceless(text: str) -> str:
    """For tokenizers that put spaces behind special tokens, which decoding then shows."""
    return text.replace(" ", "")


def check_decodes(tokenizer: PreTrainedTokenizerBase, name: str, ids: list[int], expected: str) -> None:
    """Whether the ids say `expected`, up to what the tokenizer itself adds to any text or does not know of it."""
    written = decode(tokenizer, ids)
    assert written == decode(tokenizer, tokenizer(expected, add_special_tokens=False)["input_ids"])
    if name in EXACT:
        assert written == expected


def encode_one(encoder: PromptEncoder, prompt, completion) -> tuple[list[int], list[int]]:
    return encoder.encode_prompts([prompt])[0], encoder.encode_continuations([prompt], [completion])[0]


@ALL
def test_prompt_of_plain_text_is_what_the_tokenizer_gives(name, load):
    tokenizer, draw = load(name), random.Random(1)
    prompts = [random_text(draw, letters=knows_all_letters(name)) for _ in range(60)]
    assert PromptEncoder(tokenizer).encode_prompts(prompts) == tokenizer(prompts)["input_ids"]


@ALL
def test_prompt_that_begins_with_the_bos_text_has_one_bos(name, load):
    tokenizer, bos = load(name), load(name).bos_token_id
    (ids,) = PromptEncoder(tokenizer).encode_prompts([tokenizer.bos_token + "Hello two dogs"])
    assert ids.count(bos) == 1
    assert ids[0] == bos
    assert spaceless(decode(tokenizer, ids)) == tokenizer.bos_token + "Hellotwodogs"


@ALL
def test_prompts_and_completions_need_not_come_in_batches_of_one(name, load):
    tokenizer, draw = load(name), random.Random(2)
    set_chat_template(tokenizer, None, transcript=False)
    encoder, letters = PromptEncoder(tokenizer), knows_all_letters(name)
    prompts = [random_prompt(draw, letters) if i % 2 else random_text(draw, letters=letters) for i in range(12)]
    completions = [random_text(draw, letters=letters) for _ in range(12)]
    together = list(
        zip(encoder.encode_prompts(prompts), encoder.encode_continuations(prompts, completions), strict=True)
    )
    assert together == [encode_one(encoder, *pair) for pair in zip(prompts, completions, strict=True)]
    assert encoder.encode_prompts([]) == encoder.encode_continuations([], []) == []


@pytest.mark.parametrize("seed", range(3))
@ALL
def test_plain_text_keeps_the_prompt_and_ends_once(name, seed, load):
    tokenizer, draw = load(name), random.Random(seed)
    encoder, letters = PromptEncoder(tokenizer), knows_all_letters(name)
    eos = tokenizer.eos_token_id
    for _ in range(25):
        prompt, completion = random_text(draw, letters=letters), random_text(draw, letters=letters)
        prompt_ids, completion_ids = encode_one(encoder, prompt, completion)
        assert prompt_ids == tokenizer(prompt)["input_ids"]
        assert completion_ids[-1] == eos
        assert completion_ids.count(eos) == 1
        written = decode(tokenizer, prompt_ids + completion_ids)
        assert written == decode(tokenizer, [*tokenizer(prompt + completion)["input_ids"], eos])
        if name in EXACT:
            assert written == prompt + completion + tokenizer.eos_token


@pytest.mark.parametrize("template", TEMPLATES)
@ALL
def test_messages_keep_the_prompt_of_generation_and_end_once(name, template, load):
    tokenizer, draw = load(name), random.Random(3)
    if name in REAL and template in ("chatml", "think") and name != "minimind":
        pytest.skip("the turn marks are no tokens there")
    tokenizer.chat_template = TEMPLATES[template]
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>") if template in ("chatml", "think") else None
    encoder = PromptEncoder(tokenizer, [turn_end] if turn_end is not None else [])
    end = tokenizer.eos_token_id if turn_end is None else turn_end
    for _ in range(25):
        prompt, text = random_prompt(draw, knows_all_letters(name)), random_text(draw, 8, knows_all_letters(name))
        prompt_ids, completion_ids = encode_one(encoder, prompt, reply(text))
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert completion_ids[-1] == end
        assert not encoder.end_ids & set(completion_ids[:-1])
        # What the template writes before and behind the reply is left as it is, but for the break behind its end.
        between = {"llama": (" ", " "), "bare": (" ", "\n")}.get(template, ("", ""))
        expected = start + between[0] + text + between[1] + tokenizer.convert_ids_to_tokens(end)
        check_decodes(tokenizer, name, prompt_ids + completion_ids, expected)


@pytest.mark.parametrize("transcript", [False, True], ids=["plain", "transcript"])
@ALL
def test_default_templates_train_what_they_generate_from(name, transcript, load):
    tokenizer, draw = load(name), random.Random(4)
    set_chat_template(tokenizer, None, transcript)
    encoder = PromptEncoder(tokenizer)
    for _ in range(25):
        prompt, text = random_prompt(draw, knows_all_letters(name)), random_text(draw, 8, knows_all_letters(name))
        prompt_ids, completion_ids = encode_one(encoder, prompt, reply(text))
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert completion_ids[-1] == tokenizer.eos_token_id
        assert completion_ids.count(tokenizer.eos_token_id) == 1
        trimmed = text.lstrip("\n") if name == "minimind" else text  # its own template does that
        between = "" if name == "minimind" else " "
        expected = start + between + trimmed + tokenizer.eos_token
        check_decodes(tokenizer, name, prompt_ids + completion_ids, expected)


@pytest.mark.parametrize("name", ["bytes", "bytes-bos", "gpt2", "oasst", "minimind"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Hello ", "world"), ("Hello\n", "\nworld"), ("Hell", "o world"), ("yes", "!"), ("Hello  ", " \n world")],
)
def test_text_that_would_merge_across_the_border_does_not(name, prompt, completion, load):
    tokenizer = load(name)
    prompt_ids, completion_ids = encode_one(PromptEncoder(tokenizer), prompt, completion)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    begin = tokenizer.bos_token if name == "bytes-bos" else ""
    assert decode(tokenizer, prompt_ids + completion_ids) == begin + prompt + completion + tokenizer.eos_token


@pytest.mark.parametrize("name", ["unigram", "unigram-bos", "llama-bos", "stories"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Hello ", "world"), ("Hello\n", "\nworld"), ("Hell", "o world"), ("yes", "!"), ("the ", "dog"), ("to", " run")],
)
def test_no_space_appears_at_the_border(name, prompt, completion, load):
    tokenizer = load(name)
    prompt_ids, completion_ids = encode_one(PromptEncoder(tokenizer), prompt, completion)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    written = tokenizer.decode((prompt_ids + completion_ids)[:-1], skip_special_tokens=True)
    assert written.removeprefix(" ") == prompt + completion


@pytest.mark.parametrize("text", ["<b>bold</b>", "<think", "<", "\nfirst a line break"])
def test_reply_that_begins_like_the_think_block_loses_nothing(text, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = THINK
    prompt_ids, completion_ids = encode_one(PromptEncoder(tokenizer, [4]), user("Hello"), reply(text))
    assert decode(tokenizer, prompt_ids) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert decode(tokenizer, completion_ids) == text + "<|im_end|>"


def encode_together(tokenizer, prompt, *texts: str) -> list[str]:
    """A prompt and the replies to it, encoded as one row and decoded again."""
    rows = PromptEncoder(tokenizer, [4]).encode_rows([prompt], [[reply(text)] for text in texts])
    return [decode(tokenizer, ids) for (ids,) in rows]


THOUGHTFUL = "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize("name", ["bytes", "minimind"])
def test_reply_with_thoughts_of_its_own_stands_in_place_of_the_empty_block(name, load):
    """As the template writes prompt and reply together: one think block. Other replies keep the prompt of inference."""
    tokenizer = load(name)
    if name == "bytes":
        tokenizer.chat_template = THINK
    begin = tokenizer.apply_chat_template(user("Hello"), tokenize=False, add_generation_prompt=True)
    assert begin.endswith("<think>\n\n</think>\n\n")
    without = begin.removesuffix("<think>\n\n</think>\n\n")
    assert encode_together(tokenizer, user("Hello"), "yes", "No") == [begin, "yes<|im_end|>", "No<|im_end|>"]
    both = encode_together(tokenizer, user("Hello"), THOUGHTFUL, THOUGHTFUL + "!")
    assert both == [without, THOUGHTFUL + "<|im_end|>", THOUGHTFUL + "!<|im_end|>"]
    plain = tokenizer.apply_chat_template([*user("Hello"), *reply("No")], tokenize=False).removeprefix(without)
    one = encode_together(tokenizer, user("Hello"), THOUGHTFUL, "No")
    assert one == [without, THOUGHTFUL + "<|im_end|>", plain.removesuffix("\n")]


@pytest.mark.parametrize(
    "ending",
    ["", "</s>", "</s></s>", "</s>\n", "</s> \n\n", "<|im_end|>", "<|im_end|>\n</s>", "</s>\n<|im_end|>\n"],
)
@pytest.mark.parametrize("name", ["bytes", "bytes-bos", "llama-bos"])
def test_text_that_carries_end_tokens_keeps_the_first(name, ending, load):
    tokenizer = load(name)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoder = PromptEncoder(tokenizer, [im_end])
    _, ids = encode_one(encoder, "Hello", " world" + ending)
    assert ids[-1] == (im_end if ending.startswith("<|im_end|>") else tokenizer.eos_token_id)
    assert not encoder.end_ids & set(ids[:-1])
    assert decode(tokenizer, ids[:-1]).strip() == "world"


def test_reply_whose_text_ends_in_the_end_token_ends_once(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = CHATML
    encoder = PromptEncoder(tokenizer, [4])
    for text in ("yes<|im_end|>", "yes<|im_end|>\n", "yes</s>\n"):
        _, ids = encode_one(encoder, user("Hello"), reply(text))
        assert decode(tokenizer, ids) in ("yes<|im_end|>", "yes</s>")


def test_end_token_in_the_midst_of_a_reply_stays(load):
    tokenizer = load("bytes")
    _, ids = encode_one(PromptEncoder(tokenizer), "Hello", " yes</s> No")
    assert decode(tokenizer, ids) == " yes</s> No</s>"


def test_thoughtful_reply_ends_as_the_template_ends_it(load):
    """A template that writes the empty block in front of a reply only where the reply brings no thoughts."""
    tokenizer = load("bytes")
    block = "('' if m['role'] != 'assistant' or '</think>' in m['content'] else '<think>\\n\\n</think>\\n\\n')"
    tokenizer.chat_template = THINK.replace("+ m['content']", f"+ {block} + m['content']")
    begin = tokenizer.apply_chat_template(user("Hello"), tokenize=False, add_generation_prompt=True)
    assert encode_together(tokenizer, user("Hello"), "yes") == [begin, "yes<|im_end|>"]
    without = begin.removesuffix("<think>\n\n</think>\n\n")
    assert encode_together(tokenizer, user("Hello"), THOUGHTFUL) == [without, THOUGHTFUL + "<|im_end|>"]


OPENS = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
CUTS = "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
WRITTEN = {
    "cut out": OPENS.replace("m['content']", CUTS),
    "as it is": OPENS,
    "behind an empty block": OPENS.replace(
        "+ m['content']", "+ ('<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' else '') + m['content']"
    ),
}


@pytest.mark.parametrize("text", [THOUGHTFUL, "hm\n</think>\n\nyes"])
@pytest.mark.parametrize("written", WRITTEN)
def test_reasoning_goes_on_in_the_block_that_the_prompt_opens(written, text, load):
    """As a model goes on there, whatever the template makes of the reasoning of a reply that is there."""
    tokenizer = load("bytes")
    tokenizer.chat_template = WRITTEN[written]
    prompt, completion = encode_together(tokenizer, user("Hello"), text)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert completion == "hm\n</think>\n\nyes<|im_end|>"


def notes_of(tokenizer, prompt, *texts: str) -> list[str]:
    sides = {f"side {place}": [reply(text)] for place, text in enumerate(texts)}
    (row,) = PromptEncoder(tokenizer, [4]).render_rows([prompt], sides)
    assert row.fault is None
    return list(row.notes)


def fault_of(tokenizer, prompt, *texts: str) -> str:
    sides = dict(zip(("chosen", "rejected"), ([reply(text)] for text in texts), strict=True))
    (row,) = PromptEncoder(tokenizer, [4]).render_rows([prompt], sides)
    return row.fault or ""


TAGS = {
    "<reasoning>": "</reasoning>",
    "<thought>": "</thought>",
    "<|thinking|>": "<|/thinking|>",
    "<|think|>": "</|think|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}


@pytest.mark.parametrize("opening", TAGS)
def test_think_tags_by_other_names_are_known(opening, load):
    tokenizer, closing = load("bytes"), TAGS[opening]

    def named(text: str) -> str:
        return text.replace("<think>", opening).replace("</think>", closing)

    def render(*texts: str) -> Rendered:
        (row,) = PromptEncoder(tokenizer).render_rows([user("Hello")], {text: [reply(text)] for text in texts})
        assert row.fault is None
        return row

    own = named(THOUGHTFUL)
    for written in WRITTEN.values():  # the prompt opens the block that the reply opens too
        tokenizer.chat_template = named(written)
        assert render(own).prompt.endswith(f"{opening}\n")
        assert render(own).completions[0].startswith(f"hm\n{closing}\n\nyes")
    tokenizer.chat_template = named(WRITTEN["as it is"])
    assert "opens a think block that the reply does not close" in render("yes").notes[0]
    tokenizer.chat_template = named(THINK)  # an empty block in front of a reply to come
    assert render("yes").prompt.endswith(f"{closing}\n\n")
    assert render(own).prompt.endswith("assistant\n")
    assert render(own).completions[0].startswith(own)


def test_tags_of_another_name_than_the_prompts_are_words_of_the_reply(load):
    tokenizer = load("bytes")
    text = "<reasoning>hm</reasoning>yes"
    for template in (THINK, WRITTEN["as it is"]):
        tokenizer.chat_template = template
        (row,) = PromptEncoder(tokenizer).render_rows([user("Hello")], {"chosen": [reply(text)]})
        assert row.fault is None
        assert row.completions[0].startswith(text)
        assert row.prompt == tokenizer.apply_chat_template(user("Hello"), tokenize=False, add_generation_prompt=True)


def test_answer_inside_an_open_think_block_is_said(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = WRITTEN["cut out"]
    (note,) = notes_of(tokenizer, user("Hello"), "yes")
    assert "opens a think block that the reply does not close" in note
    (note,) = notes_of(tokenizer, user("Hello"), THOUGHTFUL)
    assert "does not write the reasoning" in note
    # A block that the template closes in front of such a reply, with other blanks, is closed in training too.
    block = "'<think></think>' if m['role'] == 'assistant' and '</think>' not in m['content'] else ''"
    tokenizer.chat_template = OPENS.replace("+ m['content']", f"+ ({block}) + m['content']")
    assert notes_of(tokenizer, user("Hello"), "yes") == []
    assert encode_together(tokenizer, user("Hello"), "yes")[1] == "</think>yes<|im_end|>"


ALTERED = {
    "drops 'rejected'": ("", "No"),
    "cuts the reasoning out of 'rejected'": ("m['content'].split('</think>')[-1]", THOUGHTFUL),
    "leaves out or changes a part of 'rejected'": ("m['content'][:5]", "No, two dogs"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_words_of_a_reply_that_the_template_does_not_render_are_a_fault(what, load):
    tokenizer = load("bytes")
    altered, text = ALTERED[what]
    role = "m['role'] == 'assistant' and not loop.first"
    tokenizer.chat_template = CHATML.replace("m['content']", f"({altered or repr('')} if {role} else m['content'])")
    chosen = "" if "drops" in what else "yes"
    assert fault_of(tokenizer, user("Say No or No, two dogs"), chosen, text) == (
        f"the chat template {what} (--chat_template sets another template)"
    )
    assert fault_of(tokenizer, user("Hello"), chosen, "" if "drops" in what else "No") == ""


def test_empty_think_block_in_front_of_reasoning_is_a_fault(load):
    tokenizer = load("bytes")
    block = "('<think></think>' if m['role'] == 'assistant' else '')"
    tokenizer.chat_template = CHATML.replace("+ m['content']", f"+ {block} + m['content']")
    assert "an empty think block in front of the reasoning of 'chosen'" in fault_of(
        tokenizer, user("Hello"), THOUGHTFUL, "No"
    )
    assert fault_of(tokenizer, user("Hello"), "yes", "No") == ""


@pytest.mark.parametrize("form", ["m['content'] | trim", "m['content'] | tojson", "m['content'] | e", "m['content']"])
def test_words_in_other_clothes_are_not_missed(form, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = CHATML.replace("m['content']", f"({form})")
    prompt = [{"role": "system", "content": ' Be "brief" & <kind>é\n'}, *user("\n a < b\n\tc \\d ")]
    assert notes_of(tokenizer, prompt, ' "x" & y\n') == []


def test_turns_of_the_prompt_that_the_template_leaves_out_are_said(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = CHATML.replace(LOOP, LOOP + "{%- if m['role'] not in ['system', 'tool'] -%}").replace(
        "{%- endfor -%}", "{%- endif -%}{%- endfor -%}"
    )
    prompt = [{"role": "system", "content": "two dogs"}, *user("a"), {"role": "tool", "content": "x1"}, *user("Hello")]
    assert notes_of(tokenizer, prompt, "yes") == [
        "the chat template leaves out the system turn",
        "the chat template leaves out a turn of the tool, or a part of it",
    ]
    assert notes_of(tokenizer, user("Hello"), "yes") == []
    # Reasoning of earlier replies is left out by most templates; their words are not.
    tokenizer.chat_template = CHATML.replace("m['content']", CUTS)
    assert notes_of(tokenizer, [*user("a"), *reply(THOUGHTFUL), *user("Hello")], "yes") == []
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "(m['content'] if m['role'] == 'user' or loop.last else '')"
    )
    (note,) = notes_of(tokenizer, [*user("a"), *reply("the dog"), *user("Hello")], "yes")
    assert "an earlier turn of the assistant" in note


def test_turn_whose_words_stand_in_another_turn_is_missed_all_the_same(load):
    tokenizer = load("bytes")
    again = [*user("Hello"), *reply("yes"), *user("Hello"), *reply("yes"), *user("Hello")]
    tokenizer.chat_template = CHATML
    assert notes_of(tokenizer, again, "No") == []
    tokenizer.chat_template = CHATML.replace("in messages -%}", "in messages[-2:] -%}")
    assert [note.partition(" leaves out ")[2] for note in notes_of(tokenizer, again, "No")] == [
        "a turn of the user, or a part of it",
        "an earlier turn of the assistant, or a part of it",
    ]


def test_turn_in_another_case_or_with_other_blanks_is_changed_and_not_left_out(load):
    tokenizer = load("bytes")
    prompt = [{"role": "system", "content": "Say No,\nor yes"}, *user("Hello")]
    for form in ("m['content'] | lower", "m['content'] | replace('\n', ' ')"):
        tokenizer.chat_template = CHATML.replace("m['content']", f"(({form}) if loop.first else m['content'])")
        assert notes_of(tokenizer, prompt, "yes") == ["the chat template changes the text of a turn of the system"]
    # So few letters may stand in another word.
    tokenizer.chat_template = CHATML.replace("m['content']", "((m['content'] | lower) if loop.first else m['content'])")
    for text, does in (("Now", "leaves out the system turn"), ("Soon", "changes the text of a turn of the system")):
        prompt[0] = {"role": "system", "content": text}
        assert notes_of(tokenizer, prompt, "yes") == [f"the chat template {does}"]


CHAT_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SYSTEM = {"role": "system", "content": "You are terse.\nAnswer in one line."}
SOUND = {
    "plain": user("  What is <b>2</b> + 2?\n"),
    "system": [SYSTEM, *user('Say "hi" & bye')],
    "several turns": [*user("Hello there"), *reply(" Hi!\n"), *user("And now?\n\n  indented:\n\tx = 1")],
    "all of it": [SYSTEM, *user("Hello"), *reply("<think>\nhm\n</think>\n\nHi!"), *user("And now?")],
}


@pytest.mark.parametrize("file", CHAT_TEMPLATES, ids=lambda file: file.stem)
def test_sound_rows_pass_the_templates_of_real_models(file, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    try:
        set_chat_template(tokenizer, None, transcript=False)
    except UserError:
        pytest.skip("takes no text as content, but parts of it")
    texts = (' Sure: x < y && "z"\n\n```py\nif a:\n    b\n```\n', "No.")
    for name, prompt in SOUND.items():
        (row,) = PromptEncoder(tokenizer).render_rows(
            [prompt], {"chosen": [reply(texts[0])], "rejected": [reply(texts[1])]}
        )
        if row.refused:
            assert file.stem.startswith("gemma")
            assert name in ("system", "all of it")
            continue
        assert row.fault is None
        assert all("opens a think block" in note for note in row.notes)
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert row.prompt == start
        assert [text.strip() in written for text, written in zip(texts, row.completions, strict=True)] == [True, True]


@pytest.mark.parametrize("file", CHAT_TEMPLATES, ids=lambda file: file.stem)
def test_reasoning_is_taught_once_or_refused_with_the_templates_of_real_models(file, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    try:
        set_chat_template(tokenizer, None, transcript=False)
    except UserError:
        pytest.skip("takes no text as content, but parts of it")
    text = "<think>\nzq1\n</think>\n\nzq2"
    (row,) = PromptEncoder(tokenizer).render_rows([user("Hello")], {"chosen": [reply(text)]})
    if row.fault is None:
        text = row.prompt + row.completions[0]
        parts = ("<think>", "zq1", "</think>", "zq2")
        assert [text.count(part) for part in parts] == [1] * 4
        assert sorted(parts, key=text.index) == list(parts)


@pytest.mark.parametrize("template", ["chatml", "think"])
def test_reply_of_several_turns_ends_once_behind_the_last(template, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = TEMPLATES[template]
    _, ids = encode_one(PromptEncoder(tokenizer, [4]), user("Hello"), [*reply("yes"), *reply("No")])
    assert decode(tokenizer, ids) == "yes<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>"


def test_rows_made_by_another_version_of_a_library_are_not_used_again(load, monkeypatch):
    pairs = {"prompt": ["Hello"], "chosen": [" yes"], "rejected": [" No"], "row": [0]}

    def tokenize() -> str:
        rows = datasets.Dataset.from_dict(pairs)
        return tokenize_rows(rows, PromptEncoder(load("bytes")), PAIR_COLUMNS, 32, "drop")[0]._fingerprint

    before = tokenize()
    assert tokenize() == before
    for place in range(3):  # transformers, tokenizers, Jinja
        versions = list(tokenizing.LIBRARIES)
        versions[place] += ".1"
        monkeypatch.setattr(tokenizing, "LIBRARIES", tuple(versions))
        assert tokenize() != before


def test_empty_completion_is_the_end_token_alone(load):
    tokenizer = load("bytes-bos")
    assert encode_one(PromptEncoder(tokenizer), "Hello", "")[1] == [tokenizer.eos_token_id]


def test_tokenizer_without_end_token_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"no end-of-text token.*tokenizer_config\.json"):
        PromptEncoder(tokenizer)


def test_end_tokens_are_those_of_the_model_and_the_tokenizer(load):
    assert PromptEncoder(load("bytes"), [4]).end_ids == {2, 4}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "é", "parameters": {}}}]
WITH_TOOLS = "{%- if tools -%}{%- for t in tools -%}{{ '[' + t['function']['name'] + ']' }}{%- endfor -%}{%- endif -%}"


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_system_turn_and_tools_are_kept(tools, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = WITH_TOOLS + CHATML
    prompt = [{"role": "system", "content": "two dogs"}, *user("Hello")]
    encoder = PromptEncoder(tokenizer, [4])
    with_tools, without = encoder.encode_prompts([prompt, prompt], [tools, None])
    assert with_tools == tokenizer.apply_chat_template(prompt, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    assert decode(tokenizer, with_tools) == "[weather]" + decode(tokenizer, without)
    assert decode(tokenizer, without).startswith("<|im_start|>system\ntwo dogs<|im_end|>")
    replies = encoder.encode_continuations([prompt, prompt], [reply("yes"), reply("yes")], [tools, None])
    assert [decode(tokenizer, ids) for ids in replies] == ["yes<|im_end|>"] * 2


def test_tools_reach_the_template_from_the_rows(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = WITH_TOOLS + CHATML
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [user("Hello"), user("Hello")],
            "completion": [reply("yes"), reply("No")],
            "tools": [json.dumps(TOOLS), None],
            "row": [0, 1],
        }
    )
    tokenized, _ = tokenize_rows(rows, PromptEncoder(tokenizer, [4]), SFT_COLUMNS, 100, "shorten_prompt")
    texts = [decode(tokenizer, ids) for ids in tokenized["prompt_ids"]]
    assert [text.startswith("[weather]") for text in texts] == [True, False]


@pytest.mark.parametrize("tools", ["not JSON", '{"name": "weather"}', '["weather"]'])
def test_tools_that_are_no_list_of_objects_are_refused(tools, load):
    tokenizer = load("bytes")
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=r"column 'tools' holds .* must be a list of JSON objects"):
        PromptEncoder(tokenizer).encode_prompts([user("Hello")], [tools])


def test_conversation_that_the_template_refuses_is_the_users_to_fix(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system turns') }}{%- endif -%}" + CHATML
    )
    encoder = PromptEncoder(tokenizer)
    with pytest.raises(UserError, match=r"refuses a conversation of system, user: no system turns.*--chat_template"):
        encoder.encode_prompts([[{"role": "system", "content": "x"}, *user("Hello")]])


# Chat templates of our own, and which one is taken.


@pytest.mark.parametrize("transcript", [False, True], ids=["plain", "transcript"])
@WITHOUT_TEMPLATE
def test_default_template_writes_no_token_but_bos_and_eos(name, transcript, load):
    tokenizer, size = load(name), len(load(name))
    said = set_chat_template(tokenizer, None, transcript)
    assert "the tokenizer has none" in said
    assert "--chat_template" in said
    assert ("Human: / Assistant:" in said) == transcript
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    turns = [{"role": "system", "content": "x"}, *user("to"), *reply("yes"), *user("No"), *reply("dog")]
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    ends = 0 if transcript else 2
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        assert ids.count(tokenizer.eos_token_id) == ends + adds_bos
    else:
        assert ids.count(tokenizer.bos_token_id) == adds_bos
        assert ids.count(tokenizer.eos_token_id) == ends
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos
    others = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert not others & set(ids)
    assert len(tokenizer) == size


@pytest.mark.parametrize("transcript", [False, True], ids=["plain", "transcript"])
@WITHOUT_TEMPLATE
def test_default_generation_prompt_begins_the_whole_conversation(name, transcript, load):
    tokenizer, draw = load(name), random.Random(5)
    set_chat_template(tokenizer, None, transcript)
    for _ in range(30):
        prompt = random_prompt(draw, letters=True)
        whole = tokenizer.apply_chat_template([*prompt, *reply(random_text(draw))], tokenize=False)
        assert whole.startswith(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def test_plain_template_reads_like_this(load):
    tokenizer = load("bytes")
    set_chat_template(tokenizer, None, transcript=False)
    turns = [{"role": "system", "content": "x"}, *user("to"), *reply("yes"), *user("No")]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "System: x\n\nUser: to\n\nAssistant: yes</s>\n\nUser: No\n\nAssistant:"


@pytest.mark.parametrize(
    "text", ["\n\nHuman: Hello\n\nAssistant: world", "\n\nHuman: a \n b\n\nAssistant: c\n\nHuman:  d\n\nAssistant: e\n"]
)
def test_transcript_template_gives_the_transcript_back(text, load):
    tokenizer = load("bytes")
    set_chat_template(tokenizer, None, transcript=True)
    assert tokenizer.apply_chat_template(split_transcript(text), tokenize=False) == text


def test_tokenizers_own_template_is_kept(load):
    tokenizer = load("minimind")
    own = tokenizer.chat_template
    assert set_chat_template(tokenizer, None, transcript=True) == "the tokenizer's own"
    assert tokenizer.chat_template == own


def test_wished_template_replaces_the_tokenizers_own(load, tmp_path):
    tokenizer = load("bytes")
    tokenizer.chat_template = BARE
    assert set_chat_template(tokenizer, CHATML, transcript=False) == "as given with --chat_template"
    assert tokenizer.chat_template == CHATML
    file = tmp_path / "mine.jinja"
    file.write_text(BARE, encoding="utf-8-sig")  # with the mark that some editors put in front
    assert set_chat_template(tokenizer, str(file), transcript=False) == "as given with --chat_template"
    assert tokenizer.chat_template == BARE


def test_template_as_text_may_be_longer_than_a_file_name():
    assert read_chat_template(CHATML + " " * 9000) == CHATML + " " * 9000


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("nowhere.jinja", "no such file"),
        ("~nobody-of-that-name/nowhere.jinja", "no such file"),
        ("{% for m in messages %}", "does not render"),
        ("{{ messages[0].content.none.such }}", "does not render"),
        ("{{ raise_exception('never') }}", "does not render a user's turn: never"),
        ("{{ messages[0]['content'] + 1 }}", "does not render"),
        ("{{ 1 // 0 }}", "does not render"),
        ("{oops}", "leaves out what the user says"),
    ],
)
def test_broken_template_is_refused(template, complaint, load):
    with pytest.raises(UserError, match=complaint) as caught:
        set_chat_template(load("bytes"), template, transcript=False)
    assert "--chat_template" in str(caught.value)


def test_template_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UserError, match=r"--chat_template .*binary\.jinja: not a text file"):
        read_chat_template(str(tmp_path / "binary.jinja"))
    with pytest.raises(UserError, match="no such file"):
        read_chat_template(str(tmp_path))


def test_tokenizers_own_broken_template_is_refused(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(UserError, match="the tokenizer's chat template does not render"):
        set_chat_template(tokenizer, None, transcript=False)


@pytest.mark.parametrize("transcript", [False, True], ids=["plain", "transcript"])
@pytest.mark.parametrize("name", ["bytes", "llama-bos", "gpt2", "stories"])
def test_template_is_saved_with_the_tokenizer(name, transcript, load, tmp_path):
    tokenizer, draw = load(name), random.Random(6)
    set_chat_template(tokenizer, None, transcript)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompt = random_prompt(draw, letters=False)
    assert set_chat_template(again, None, transcript=False) == "the tokenizer's own"
    for options in ({"add_generation_prompt": True}, {}):
        expected = tokenizer.apply_chat_template(prompt, **options)["input_ids"]
        assert again.apply_chat_template(prompt, **options)["input_ids"] == expected


# Rows that are too long.


@pytest.mark.parametrize(
    ("prompt", "completions", "max_length", "expected"),
    [
        (10, [5, 8], 18, (10, [5, 8])),  # fits exactly
        (10, [5, 8], 17, (9, [5, 8])),  # the longer completion decides
        (10, [5, 30], 20, (5, [5, 15])),  # the prompt keeps a quarter, then the completion is cut
        (3, [30, 40], 20, (3, [17, 17])),  # a prompt shorter than that is kept whole
        (100, [1, 1], 20, (19, [1, 1])),
        (7, [9], 3, (1, [2])),  # a quarter of 3 is none: the prompt keeps one token
        (0, [9], 4, (0, [4])),
    ],
)
def test_lengths_that_fit(prompt, completions, max_length, expected):
    assert fit_lengths(prompt, completions, max_length) == expected


def test_lengths_always_fit_and_nothing_is_given_up_in_vain():
    draw = random.Random(7)
    for _ in range(5000):
        prompt, max_length = draw.randint(1, 60), draw.randint(2, 60)
        completions = [draw.randint(1, 60) for _ in range(draw.randint(1, 2))]
        kept_prompt, kept = fit_lengths(prompt, completions, max_length)
        assert 1 <= kept_prompt <= prompt
        assert all(1 <= k <= length for k, length in zip(kept, completions, strict=True))
        assert kept_prompt + max(kept) <= max_length
        if kept != completions:  # before that, the prompt gave what it had to, and nothing is left unused
            assert kept_prompt <= max(max_length // PROMPT_SHARE_KEPT, 1)
        if (kept_prompt, kept) != (prompt, completions):
            assert kept_prompt + max(kept) == max_length
            assert kept_prompt >= min(prompt, max_length // PROMPT_SHARE_KEPT)


def random_rows(draw: random.Random, count: int, as_turns: bool) -> datasets.Dataset:
    prompts = [random_prompt(draw, True) if as_turns else random_text(draw, 20) for _ in range(count)]
    texts = [[random_text(draw, 20) for _ in range(count)] for _ in range(2)]
    chosen, rejected = ([reply(text) for text in side] if as_turns else side for side in texts)
    # Rows that were left out before leave holes in the numbering.
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "chosen": chosen, "rejected": rejected, "row": [3 * i for i in range(count)]}
    )


def differs_when_cut(row: dict, max_length: int) -> bool:
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    _, (left, right) = fit_lengths(len(row["prompt_ids"]), [len(chosen), len(rejected)], max_length)
    return chosen[:left] != rejected[:right]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("as_turns", [False, True], ids=["text", "turns"])
@pytest.mark.parametrize("name", ["bytes", "bytes-bos"])
def test_shortened_rows_fit_and_are_counted(name, as_turns, seed, load):
    tokenizer, draw = load(name), random.Random(seed)
    set_chat_template(tokenizer, None, transcript=False)
    encoder, max_length = PromptEncoder(tokenizer), draw.choice([2, 3, 8, 20, 35, 60, 400])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    rows = random_rows(draw, 40, as_turns)
    full, untouched = tokenize_rows(rows, encoder, PAIR_COLUMNS, 10_000, "error")
    assert untouched == Truncation(0, 0, 0)
    differ = [place for place, row in enumerate(full) if differs_when_cut(row, max_length)]  # others are bad rows
    rows, full = rows.select(differ), full.select(differ)
    tokenized, truncation = tokenize_rows(rows, encoder, PAIR_COLUMNS, max_length, "shorten_prompt")
    assert tokenized["row"][:] == rows["row"][:]
    shortened = cut = 0
    for whole, fitted in zip(full, tokenized, strict=True):
        prompt, kept = whole["prompt_ids"], fitted["prompt_ids"]
        sides = [(whole[side], fitted[side]) for side in PAIR_COLUMNS]
        assert len(kept) + max(len(ids) for _, ids in sides) <= max_length
        was_cut = False
        for ids, kept_ids in sides:
            assert kept_ids == ids[: len(kept_ids)]
            assert (kept_ids[-1] == eos) == (kept_ids == ids)
            was_cut |= kept_ids != ids
        assert len(kept) >= min(len(prompt), max_length // PROMPT_SHARE_KEPT, 1)
        assert fitted["shortened"] == (kept != prompt)
        assert fitted["cut"] == was_cut
        if kept != prompt:
            begins = name == "bytes-bos" and len(kept) > 1
            assert (kept[0] == bos) == begins
            tail = kept[1:] if begins else kept
            assert tail == prompt[len(prompt) - len(tail) :]
        shortened, cut = shortened + (kept != prompt and not was_cut), cut + was_cut
    assert truncation == Truncation(shortened, cut, 0)
    assert truncation.truncated == sum(
        a != b for a, b in zip(full["prompt_ids"], tokenized["prompt_ids"], strict=True)
    ) + sum(a["prompt_ids"] == b["prompt_ids"] and b["cut"] for a, b in zip(full, tokenized, strict=True))

    too_long = shortened + cut
    if too_long == len(rows):
        with pytest.raises(UserError, match=f"--max_length {max_length} .* leaves none of {len(rows)} rows"):
            tokenize_rows(rows, encoder, PAIR_COLUMNS, max_length, "drop")
    else:
        left, dropping = tokenize_rows(rows, encoder, PAIR_COLUMNS, max_length, "drop")
        assert dropping == Truncation(0, 0, too_long)
        assert len(left) + dropping.dropped == len(rows)
        fits = [i for i, row in enumerate(tokenized) if not (row["shortened"] or row["cut"])]
        assert left["row"][:] == [rows["row"][i] for i in fits]
        assert left["chosen_ids"][:] == [full["chosen_ids"][i] for i in fits]
    if too_long:
        first = next(row["row"] for row in tokenized if row["shortened"] or row["cut"])
        complaint = rf"too short for {too_long} of {len(rows)} rows \(data row {first + 1}[,)]"
        with pytest.raises(UserError, match=complaint):
            tokenize_rows(rows, encoder, PAIR_COLUMNS, max_length, "error")


def test_sft_rows_are_fitted_alike(load):
    tokenizer = load("bytes-bos")
    rows = datasets.Dataset.from_dict(
        {"prompt": ["Hello " * 20, "a"], "completion": ["world", "dog " * 50], "row": [0, 1]}
    )
    tokenized, truncation = tokenize_rows(rows, PromptEncoder(tokenizer), SFT_COLUMNS, 20, "shorten_prompt")
    assert truncation == Truncation(prompts_shortened=1, completions_cut=1, dropped=0)
    assert [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in tokenized] == [20, 20]
    assert [row["completion_ids"][-1] == tokenizer.eos_token_id for row in tokenized] == [True, False]


def test_shortened_prompt_keeps_the_bos_that_only_the_template_writes(load):
    tokenizer = load("bytes")
    tokenizer.chat_template = LLAMA
    rows = datasets.Dataset.from_dict({"prompt": [user("Hello " * 30)], "completion": [reply("yes")], "row": [0]})
    tokenized, truncation = tokenize_rows(rows, PromptEncoder(tokenizer), SFT_COLUMNS, 20, "shorten_prompt")
    assert truncation.prompts_shortened == 1
    ids = tokenized[0]["prompt_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert decode(tokenizer, ids).endswith("Hello  [/INST]")
