"""What one gRPC client does: full answers, deadlines, drops. Each action is one call; its result is what it counts as. Any thread."""
import grpc

from answers import request_fields


class RpcClient:
    def __init__(self, stub, pb, answers):
        self.stub, self.pb, self.answers = stub, pb, answers
        self.actions = [(15, self.rpc), (6, self.drop_rpc), (6, self.deadline)]

    def call(self, rng, index, timeout):
        request = request_fields(rng, index)
        sampling = {key: request[key] for key in ("temperature", "seed", "top_p", "top_k", "min_p", "frequency_penalty",
                                                  "repetition_penalty") if key in request}
        mode = request.get("speculation", "unspecified")
        return self.stub.Generate(self.pb.GenerateRequest(
            text=request["prompt"], sampling=self.pb.SamplingParameters(**sampling),
            stopping=self.pb.StoppingParameters(max_tokens=request["max_tokens"], stop=request.get("stop", [])),
            speculation=self.pb.Speculation.Value(f"SPECULATION_{mode.upper()}")), timeout=timeout)

    def rpc(self, rng, index, timeout=300, name="gRPC", expected=()):
        text = ""
        try:
            for response in self.call(rng, index, timeout):
                text += response.text
        except grpc.RpcError as error:
            self.answers.compare(index, text, whole=False)
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                return "refused"
            if error.code() not in expected:
                raise ConnectionError(f"gRPC {error.code()}: {error.details()}") from error
            return f"{name} passed"
        self.answers.compare(index, text)
        return name

    def deadline(self, rng, index):
        return self.rpc(rng, index, rng.choice([0.001, 0.01, 0.05, 0.2]), "deadline", [grpc.StatusCode.DEADLINE_EXCEEDED])

    def drop_rpc(self, rng, index):
        call = self.call(rng, index, 300)
        try:
            for count, _ in enumerate(call):
                if count >= rng.randrange(0, 6):
                    break
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise ConnectionError(f"gRPC {error.code()}") from error
        call.cancel()
        return "gRPC dropped"
