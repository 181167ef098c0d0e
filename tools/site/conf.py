"Sphinx's settings, and what it is taught about these sources; build.py sets what depends on the notebooks."

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

from docutils.nodes import SkipNode, raw
from docutils.nodes import title as title_node
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.pycode import ModuleAnalyzer

import nanomoe

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx_copybutton']
root_doc = 'index'
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_code_prompt_show = 'Show the code'
nb_code_prompt_hide = 'Hide the code'
myst_enable_extensions = ['dollarmath']
myst_disable_syntax = ['myst_line_comment', 'myst_block_break', 'myst_target']
myst_heading_anchors = 4
default_role = 'py:obj'  # `name` in a docstring: a link, or code where nothing has that name

autodoc_default_options = {'undoc-members': True, 'member-order': 'bysource'}
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'furo'
html_static_path = ['static']
templates_path = ['templates']
html_css_files = ['course.css']
html_js_files = ['course.js']
EXPLORER_SCRIPTS = ['drawing.js', 'routing.js', 'sizes.js', 'explorers.js']  # in this order
COLORS = {
    'color-brand-primary': '#0072b2',  # expert 0
    'color-brand-content': 'var(--color-brand-primary)',
    'color-brand-visited': 'var(--color-brand-primary)',
    'color-sidebar-link-text': 'var(--color-foreground-secondary)',
    'color-sidebar-link-text--top-level': 'var(--color-foreground-secondary)',
    'color-api-name': 'var(--color-brand-primary)',
    'color-api-pre-name': 'var(--color-foreground-muted)',
}
html_theme_options = {
    'top_of_page_buttons': ['view'],
    'light_css_variables': COLORS,
    'dark_css_variables': COLORS | {'color-brand-primary': '#56b4e9'},
}
html_search_scorer = str(Path(__file__).with_name('scorer.js'))
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_domain_indices = False
html_math_renderer = 'mathml'
copybutton_prompt_text = '>>> '
copybutton_exclude = '.linenos, .gp, .go'


def number_titles(app, env):
    "In search results and beneath a page, the lesson's number and short name come before its question."
    for name, label in app.config.html_context['labels'].items():
        env.titles[name] = env.longtitles[name] = title_node('', f'{label} · {env.titles[name].astext()}')


def page_context(app, name, template, context, doctree):
    "The page's sentence and address, and neighbors in the order of the lessons' numbers."
    context['sentence'] = app.config.html_context['sentences'].get(name, '')
    order = ['index', *sorted(app.config.html_context['labels'])]
    for way, step in (('prev', -1), ('next', 1)) if name in order[1:] else ():
        place = order.index(name) + step
        context[way] = None
        if place < len(order):
            link = app.builder.get_relative_uri(name, order[place])
            context[way] = {'title': app.env.titles[order[place]].astext(), 'link': link}


def explorer_scripts(app, name, template, context, doctree):
    "Pages with explorers load the scripts that make them work."
    if doctree and any('class="explorer"' in node.astext() for node in doctree.findall(raw)):
        for script in EXPLORER_SCRIPTS:
            app.add_js_file(script, loading_method='defer')


def constant(match: re.Match) -> str:
    "A constant below its documentation, the comment behind it; a value of several lines is not shown."
    hidden = '#:\n#: :meta hide-value:\n' if match[1][-1] in '{[(' else ''
    return f'#: {match[2] or ""}\n{hidden}{match[1]}'


def comments_are_docs(app):
    "Comments beside and above the fields of a class, and constants, are read as their documentation."
    for path in sorted(Path(nanomoe.__file__).parent.glob('[a-z]*.py')):
        text = re.sub(r'^(    \w+: .*? +|(?:    )?)# (?!%%)', r'\1#: ', path.read_text(), flags=re.M)
        text = re.sub(r'^([A-Za-z]\w*(?:: .*?)? = .*?)(?:  # (.*))?$', constant, text, flags=re.M)
        name = f'nanomoe.{path.stem}'
        ModuleAnalyzer.cache['module', name] = ModuleAnalyzer.for_string(text, name, path.name)
        module = importlib.import_module(name)
        for custom, function in [(key, getattr(op, '_init_fn', None)) for key, op in vars(module).items()]:
            if function:  # the Python function of an operator that torch registers
                setattr(module, custom, function)


def is_inherited(app, kind, name, member, skip, options) -> bool | None:
    "Methods that other packages write into our classes are left out."
    if inspect.isroutine(member) and not (member.__module__ or '').startswith('nanomoe'):
        return True


def signature(app, kind, name, member, options, arguments, result) -> tuple[str, None] | None:
    "None for a class whose fields are listed below it, and for one that is made as its base is."
    if kind == 'class' and (dataclasses.is_dataclass(member) or '__init__' not in vars(member)):
        return '', None


def plain_text(app, kind, name, member, options, lines: list[str]):
    "Docstrings are not reStructuredText: only `names`, lists and examples mean in it what they mean to us."
    if kind == 'module':
        lines.clear()  # the page begins with it
    for place, line in enumerate(lines):
        if '>>>' not in line:
            lines[place] = re.sub(r'(`[^`]+`)(?=\w)', r'\1\\ ', re.sub(r'[*|]|_(?!\w)', r'\\\g<0>', line))


def mathml(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=node.tagname == 'math_block'))
    raise SkipNode


def setup(app):
    app.connect('builder-inited', comments_are_docs)
    app.connect('autodoc-skip-member', is_inherited)
    app.connect('autodoc-process-docstring', plain_text)
    app.connect('autodoc-process-signature', signature)
    app.connect('env-updated', number_titles)
    app.connect('html-page-context', page_context)
    app.connect('html-page-context', explorer_scripts)
    app.add_html_math_renderer('mathml', (mathml, None), (mathml, None))
