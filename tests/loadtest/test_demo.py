"""What the demo shows and counts, without a server."""

from backend.demo.prompts import demo_prompts
from backend.demo.tasks import FORMS
from loadtest.demo import INTERFACES, examples, right_answers, table_of
from loadtest.record import RequestRecord


def _record(number: int, text: str) -> RequestRecord:
    return RequestRecord(
        id=number, protocol=INTERFACES[number % 4], intended_start_s=0.0, start_s=0.0, responses=[(1.0, 1), (2.0, 3)],
        end_s=2.0, output_tokens=4, text=text,
    )  # fmt: skip


def test_examples_are_of_every_form():
    assert [prompt.form for prompt in examples(demo_prompts())] == ["free"] * 2 + ["letter"] * 2 + ["chat"] * 2


def test_answers_are_counted_where_one_is_right():
    prompts = demo_prompts()
    checked = [prompt for prompt in prompts if prompt.form in FORMS]
    said_right = [_record(i, f" {prompt.answer}") for i, prompt in enumerate(prompts)]
    assert right_answers(prompts, said_right) == (len(checked), len(checked))
    said_nothing = [_record(i, "") for i in range(len(prompts))]
    assert right_answers(prompts, said_nothing) == (0, len(checked))


def test_the_table_has_a_row_for_every_interface_and_one_for_all():
    table = table_of([_record(i, "") for i in range(8)])
    assert list(table.columns[0].cells) == [*INTERFACES, "all"]
    assert list(table.columns[1].cells) == ["2"] * 4 + ["8"]
