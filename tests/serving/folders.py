"""A tiny compressed model that can be talked to."""

import shutil

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(folder, out):
    """A copy of a model's folder with a chat template."""
    shutil.copytree(folder, out)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out
