"""What chat templates of known families do, in words of our own, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EACH = "{% for m in messages %}"
ENDS = "{% endfor %}"
CHATML = (
    EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}" + ENDS
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
LLAMA3 = (
    "{{ bos_token }}{{ 'Today Date: ' + strftime_now('%d %b %Y') }}" + EACH
    + "{{ '<|start|>' + m.role + '<|sep|>\n\n' + m.content | trim + '<|eot|>' }}" + ENDS
    + "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}"
)  # fmt: skip
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content"
    " + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ bos_token +"
    " '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRICT = (
    "{{ bos_token }}" + EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}" + ENDS
)  # fmt: skip
SYSTEM_LAST = (
    "{{ bos_token }}{% set ns = namespace(system='', last=0) %}" + EACH
    + "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}{% set ns.last = loop.index %}{% endif %}" + ENDS + EACH
    + "{% if m.role == 'user' %}[INST] {% if ns.system and loop.index == ns.last %}"
    "{{ ns.system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}" + ENDS
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + EACH
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}" + ENDS
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
QWEN3 = (
    EACH + "{% set text = m.content %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ text }}<|im_end|>\n" + ENDS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
DEEPSEEK = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}" + ENDS
    + "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)  # fmt: skip
HARMONY = (
    EACH + "{{ '<|start|>' + m.role + '<|message|>' + m.content }}{{ '<|return|>' if loop.last and"
    " m.role == 'assistant' else '<|end|>' }}" + ENDS
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)  # fmt: skip
HEADERS = (
    "[gMASK]" + EACH + "{{ '<|' + m.role + '|>\n' + m.content }}" + ENDS
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # fmt: skip
LINES = (
    EACH + "{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}" + ENDS
    + "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)  # fmt: skip
MARKED = (
    EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "\n" + ENDS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
PARTS = (
    EACH + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n" + ENDS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
FAMILIES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "strict": STRICT,
    "system last": SYSTEM_LAST,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "headers": HEADERS,
    "lines": LINES,
    "marked": MARKED,
    "parts": PARTS,
}
SPECIALS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "<|message|>", "<|end|>", "<|return|>", "[gMASK]",
    "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
UNMARKED = ("<|User|>", "<|Assistant|>", "<think>", "</think>")
"""Tokens that are added and not marked as special, as those of DeepSeek and Qwen."""


def byte_tokenizer(
    template: str | None, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, but for merges; every family's control tokens; `</s>` ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys([*SPECIALS, *alphabet, *("".join(pair) for pair in merges)])
    backend = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[*merges])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIALS])
    backend.add_tokens([*UNMARKED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
