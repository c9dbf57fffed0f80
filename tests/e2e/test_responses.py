"""/v1/responses with the OpenAI Python SDK, unmodified: one question and its answer, plain and streamed."""
import asyncio

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


def chat(client, model, messages, **fields):
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **fields)


def test_plain_equals_chat(client, model):
    for text in ("Hello", QUESTION, [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}], "type": "message"}]):
        result = client.responses.create(model=model, input=text, max_output_tokens=12, temperature=0, store=False)
        expected = chat(client, model, QUESTION, max_tokens=12)
        assert result.output_text == expected.choices[0].message.content
        assert result.usage.output_tokens == expected.usage.completion_tokens
        assert result.usage.input_tokens == expected.usage.prompt_tokens
        ended = expected.choices[0].finish_reason == "stop"
        assert result.status == ("completed" if ended else "incomplete")
        assert ended or result.incomplete_details.reason == "max_output_tokens"
        message = result.output[0]
        assert message.type == "message" and message.role == "assistant" and message.content[0].type == "output_text"
        assert result.store is False and result.error is None and result.tools == []


def test_instructions_come_first_and_answers_can_be_sent_back(client, model):
    first = client.responses.create(model=model, input="Hello", instructions="Be brief.", max_output_tokens=8, temperature=0,
                                    metadata={"trace": "7"})
    assert first.instructions == "Be brief." and first.metadata == {"trace": "7"}
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert first.output_text == chat(client, model, system, max_tokens=8).choices[0].message.content
    more = [{"role": "user", "content": "And then?"}]
    second = client.responses.create(model=model, max_output_tokens=8, temperature=0,
                                     input=[*QUESTION, *[item.model_dump() for item in first.output], *more])
    expected = chat(client, model, [*QUESTION, {"role": "assistant", "content": first.output_text}, *more], max_tokens=8)
    assert second.output_text == expected.choices[0].message.content


def test_stream(client, model):
    fields = dict(model=model, input="Hello", max_output_tokens=24, temperature=0)
    plain = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == "response." + plain.status
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == plain.output_text and all(deltas)
    last = events[-1].response
    assert last.output_text == plain.output_text and last.usage == plain.usage and last.id == events[0].response.id
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_stream_helper_accumulates(client, model):
    with client.responses.stream(model=model, input="Hello", max_output_tokens=200, temperature=0) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    plain = client.responses.create(model=model, input="Hello", max_output_tokens=200, temperature=0)
    assert snapshots[-1] == plain.output_text


def test_async_streams_at_once(server, client, model):
    async def one(api, text):
        result = ""
        async for event in await api.responses.create(model=model, input=text, max_output_tokens=12, temperature=0, stream=True):
            result += event.delta if event.type == "response.output_text.delta" else ""
        return result

    async def run(texts):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused") as api:
            return await asyncio.gather(*[one(api, text) for text in texts])

    texts = ["Hello", "Tell me a story.", "Who are you?"]
    assert asyncio.run(run(texts)) == [asyncio.run(run([text]))[0] for text in texts]


REFUSED = {"store": True, "previous_response_id": "resp_1", "conversation": "conv_1", "background": True, "include": ["x"],
           "tools": [{"type": "web_search"}], "tool_choice": "required", "reasoning": {"effort": "low"}, "truncation": "auto",
           "text": {"format": {"type": "json_object"}}, "top_logprobs": 3, "max_tool_calls": 2, "prompt": {"id": "p"}}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name(client, model, name):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=model, input="x", **{name: REFUSED[name]})
    assert error.value.param == name and name in error.value.message


def test_nothing_is_stored(server, client, model):
    result = client.responses.create(model=model, input="Hello", max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(result.id)
    assert httpx.post(server.url + "/v1/responses", json={"input": []}).json()["error"]["param"] == "input"
