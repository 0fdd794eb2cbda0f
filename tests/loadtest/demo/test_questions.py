"""The demo's questions, without a server."""

from backend.config import DEMO_CHECKPOINT
from backend.demo.prompts import demo_prompts
from backend.demo.tasks import FORMS
from backend.demo.template import ASSISTANT, USER
from backend.tokenizer import load_tokenizer
from loadtest.demo.questions import INTERFACES, ConversationPrompts, examples, right_answers, table_of
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


def test_conversations_are_as_long_as_asked_and_never_the_same():
    tokenizer = load_tokenizer(str(DEMO_CHECKPOINT), None)
    prompts = ConversationPrompts(7, tokenizer)
    texts = [prompts.text(number, 120) for number in range(40)]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert all(text.startswith(USER) and text.endswith(ASSISTANT) for text in texts)
    assert max(lengths) <= 120 and sum(lengths) / len(lengths) > 90
    assert len({text[:40] for text in texts}) > 35  # the prefix cache helps none of them
    assert texts == [ConversationPrompts(7, tokenizer).text(number, 120) for number in range(40)]
    assert texts != [ConversationPrompts(8, tokenizer).text(number, 120) for number in range(40)]
