"""Chat templates as the families write them, abridged to what a call, an answer and reasoning look like."""

_TURNS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}ASK{% endif %}"
)
_HERMES = """{% if not loop.first %}{{ '\n' }}{% endif %}{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\n</tool_call>' }}"""
_CODER = (
    "{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}"
)


def _chatml(call: str, ask: str = "") -> str:
    return _TURNS.replace("CALL", call).replace("ASK", ask)


HERMES = _chatml(_HERMES)
THINKING = _chatml(_HERMES, "{{ '<think>\n' }}") + "{# </think> ends it #}"
CODER = _chatml(_CODER)
# The whole call as JSON, as it came.
NESTED = _chatml("{{ '<call>' + (c | tojson) + '</call>' }}")
PYTHONIC = _chatml(
    "{{ '[' + c.function.name + '(' }}{% for k, v in c.function.arguments.items() %}{{ k }}={% endfor %})]"
)
PLAIN = _chatml("").replace("tools", "nothing")
LLAMA = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    """{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}"""
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}CALLS</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
MISTRAL_LIST = _MISTRAL.replace(
    "CALLS",
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}"""
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
)
MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}",
)
HARMONY = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{# <|channel|>analysis<|message|> #}{% for m in messages %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}"
    "{{ '<|channel|>commentary json<|message|>' }}{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
READABLE = {
    "hermes": HERMES,
    "thinking": THINKING,
    "coder": CODER,
    "nested": NESTED,
    "llama": LLAMA,
    "mistral-list": MISTRAL_LIST,
    "mistral-named": MISTRAL_NAMED,
    "harmony": HARMONY,
}
