# ruff: noqa: F811, F821

# %% exercise-both: replaces one file after the other
def replacement(folder, texts):
    return [partial(write_whole, folder / name, text) for name, text in texts.items()]


# %% exercise-both: removes the old folder before the new one has its name
def replacement(folder, texts):
    made = folder.with_name('.made')
    return [
        partial(made.mkdir, exist_ok=True),
        *(partial((made / name).write_text, text) for name, text in texts.items()),
        partial(shutil.rmtree, folder),
        partial(os.replace, made, folder),
    ]
