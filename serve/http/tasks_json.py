"""The task table for clients: as data for programs, as text for people."""

from __future__ import annotations

from florence2.tasks import TASKS, TaskInput


def tasks_json() -> dict[str, list[dict[str, str]]]:
    """The answer of ``/tasks``: every task prompt with its name, input, output and summary."""
    return {
        "tasks": [
            {
                "token": task.token,
                "name": task.name,
                "takes": task.takes.value,
                "gives": task.output.value,
                "summary": task.summary,
            }
            for task in TASKS
        ]
    }


def instructions() -> str:
    """The text of ``/get_prompt_instructions``: which prompts the model understands."""
    lines = [f"{task.token}: {task.summary}.{_INPUT_HINTS[task.takes]}" for task in TASKS]
    return "\n".join(["Florence-2 answers task prompts. Send one of these as text_prompt:", *lines])


_INPUT_HINTS = {
    TaskInput.NONE: "",
    TaskInput.TEXT: " Write the text right after the prompt.",
    TaskInput.REGION: " Needs a region: give one in the settings.",
    TaskInput.OPTIONAL_TEXT: " A text may follow the prompt.",
}
