"""Griffe extension: docstrings of the package in the site's notation."""

import inspect
import re

import griffe

_BLOCK = r'\n(?:(?:{} +\S.*)?\n)*'
_MATH = re.compile(
  r'^( *)\.\. math::[ ]*(.*' + _BLOCK.format(r'\1') + ')', re.M
)
_CODE = re.compile(r'^( *)Example::(' + _BLOCK.format(r'\1') + ')', re.M)
_REFERENCE = re.compile(r'^References?:(' + _BLOCK.format('') + ')', re.M)


class Notation(griffe.Extension):
  """Writes equations and examples as Markdown and griffe have them."""

  def on_object(self, *, obj, **kwargs):
    """Rewrites the docstring of an object."""
    del kwargs
    if obj.docstring:
      text = inspect.cleandoc(obj.docstring.value) + '\n'
      text = _MATH.sub(_equation, text)
      text = _CODE.sub(_fenced, text)
      text = re.sub('^( *)Example:$', r'\1Examples:', text, flags=re.M)
      text = _REFERENCE.sub(_paragraph, text)
      obj.docstring.value = text.rstrip()


def _equation(match):
  lines = [line.strip() for line in match[2].splitlines() if line.strip()]
  return '\n'.join(f'{match[1]}{x}' for x in ['$$', *lines, '$$', '', ''])


def _fenced(match):
  code = match[2].strip('\n')
  fence = ' ' * (len(match[1]) + 2) + '```'
  return f'{match[1]}Examples:\n{fence}python\n{code}\n{fence}\n\n'


def _paragraph(match):
  return f'**Reference:** {inspect.cleandoc(match[1])}\n\n'
