// Streams one answer of a starmesh cluster to the terminal. What it shows, and its flags: ../README.md.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <google/protobuf/util/time_util.h>
#include <grpcpp/grpcpp.h>

#include "google/rpc/error_details.pb.h"
#include "starmesh/v1/inference.grpc.pb.h"

using google::protobuf::util::TimeUtil;
using namespace starmesh::v1;
using std::chrono::milliseconds;
using std::chrono::system_clock;

namespace {

constexpr int kResumes = 8;  // tries to go on after the last message that came
constexpr milliseconds kCallTimeout{10'000}, kFirstPause{100}, kLongestPause{1'000};

struct Arguments {
  std::map<std::string, std::string> flags = {{"tokens", "256"},      {"request-id", ""},   {"deadline", "300"},
                                              {"resume-window", "10"}, {"cancel-after", "0"}, {"ca", ""},
                                              {"api-key", ""}};
  std::vector<std::string> positionals;
};

Arguments ReadArguments(int count, char** values) {
  Arguments arguments;
  if (const char* key = std::getenv("STARMESH_API_KEY")) arguments.flags["api-key"] = key;
  for (int i = 1; i < count; ++i) {
    const std::string value = values[i];
    if (value.rfind("--", 0) != 0) {
      arguments.positionals.push_back(value);
    } else if (arguments.flags.count(value.substr(2)) && i + 1 < count) {
      arguments.flags[value.substr(2)] = values[++i];
    } else {
      throw std::invalid_argument("do not know " + value + ", or its value is missing");
    }
  }
  if (arguments.positionals.size() != 2) throw std::invalid_argument("give an address and a prompt");
  return arguments;
}

milliseconds Milliseconds(const std::string& seconds) { return milliseconds(std::llround(std::stod(seconds) * 1000)); }

std::shared_ptr<grpc::Channel> Connect(const std::string& address, const std::string& ca) {
  auto credentials = grpc::InsecureChannelCredentials();
  if (!ca.empty()) {
    std::ostringstream pem;
    // Without a certificate gRPC would go by the system's.
    if (!(pem << std::ifstream(ca).rdbuf())) throw std::invalid_argument("cannot read " + ca);
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = pem.str();
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  // Notices within half a minute that a silent network has lost the router, and looks for it again within a second.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  return grpc::CreateCustomChannel(address, credentials, arguments);
}

std::unique_ptr<grpc::ClientContext> MakeContext(const std::string& key, system_clock::time_point deadline) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(deadline);
  if (!key.empty()) context->AddMetadata("authorization", "Bearer " + key);
  return context;
}

// The detail of that type in an error's google.rpc details, if it is there. They travel as a google.rpc.Status, which
// has the same fields as starmesh.v1.SequenceStatus.
template <typename Detail>
std::optional<Detail> FindDetail(const grpc::Status& error) {
  SequenceStatus packed;
  Detail detail;
  if (packed.ParseFromString(error.error_details()))
    for (const auto& any : packed.details())
      if (any.UnpackTo(&detail)) return detail;
  return std::nullopt;
}

// What a person does about an error, in one line.
std::string NextStep(const grpc::Status& error) {
  if (const auto bad = FindDetail<google::rpc::BadRequest>(error)) {
    std::string changes;
    for (const auto& violation : bad->field_violations())
      changes += (changes.empty() ? "change " : "; change ") + violation.field() + ": " + violation.description();
    return changes;
  }
  if (const auto retry = FindDetail<google::rpc::RetryInfo>(error)) {
    std::ostringstream step;
    step << "ask again after " << TimeUtil::DurationToMilliseconds(retry->retry_delay()) / 1000.0 << " s";
    return step.str();
  }
  switch (error.error_code()) {
    case grpc::StatusCode::UNAUTHENTICATED:
      return "give a valid key with --api-key";
    case grpc::StatusCode::PERMISSION_DENIED:
      return "use a key that may do this";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "what was printed stays valid; allow more time with --deadline";
    case grpc::StatusCode::UNAVAILABLE:
      return "see whether a router listens there, and whether it wants TLS (--ca)";
    default:
      return "see the message";
  }
}

// The name of an enum's value without the prefix that the .proto file gives it.
std::string Name(FinishReason reason) {
  return FinishReason_Name(reason).substr(std::string("FINISH_REASON_").size());
}

// Streams the answer, through broken connections.
grpc::Status Answer(InferenceService::Stub& router, const Arguments& arguments) {
  const auto& flags = arguments.flags;
  const milliseconds window = Milliseconds(flags.at("resume-window"));
  const int cancel_after = std::stoi(flags.at("cancel-after"));
  const std::string& key = flags.at("api-key");
  const auto deadline = system_clock::now() + Milliseconds(flags.at("deadline"));

  GenerateRequest request;
  request.set_request_id(flags.at("request-id"));
  auto* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(arguments.positionals[1]);
  request.mutable_sampling()->set_max_output_tokens(std::stoi(flags.at("tokens")));
  *request.mutable_resume_window() = TimeUtil::MillisecondsToDuration(window.count());

  auto context = MakeContext(key, deadline);
  auto stream = router.Generate(context.get(), request);
  GenerateResponse response;
  int tokens = 0, resumes = 0;
  bool cancelled = false;
  for (int tries = 0;;) {
    while (stream->Read(&response)) {
      tries = 0;
      tokens = response.offset() + response.token_ids_size();
      std::cout << response.text() << std::flush;
      if (response.finish_reason() != FINISH_REASON_UNSPECIFIED) {
        const auto& usage = response.usage();
        std::cerr << "\n[" << Name(response.finish_reason()) << ": " << usage.prompt_tokens() << " prompt tokens, "
                  << usage.output_tokens() << " output tokens, " << usage.recoveries() << " recoveries, "
                  << usage.migrations() << " migrations, " << resumes << " resumes]\n";
      } else if (cancel_after > 0 && tokens >= cancel_after && !cancelled) {
        cancelled = true;
        if (window.count() == 0) {
          context->TryCancel();  // enough where no stream of the request can follow
        } else {
          CancelRequest cancel;
          CancelResponse acknowledged;
          cancel.set_request_id(response.request_id());
          const auto status =
              router.Cancel(MakeContext(key, system_clock::now() + kCallTimeout).get(), cancel, &acknowledged);
          const bool ended = status.error_code() == grpc::StatusCode::NOT_FOUND;
          if (!status.ok() && !ended) return status;
        }
      }
    }
    const grpc::Status status = stream->Finish();
    if (status.ok()) return status;
    if (cancelled && status.error_code() == grpc::StatusCode::CANCELLED) {
      std::cerr << "\n[cancelled by ending the call: " << tokens << " output tokens]\n";
      return grpc::Status::OK;
    }
    // The router keeps the request for the resume window: go on behind the last token that came.
    const bool broken = status.error_code() == grpc::StatusCode::UNAVAILABLE &&
                        !FindDetail<google::rpc::RetryInfo>(status);
    if (!broken || window.count() == 0 || tokens == 0 || tries == kResumes) return status;
    std::this_thread::sleep_for(std::min(kLongestPause, kFirstPause * (1 << tries)));
    ++tries;
    ++resumes;
    ResumeRequest resume;
    resume.set_request_id(response.request_id());
    resume.set_offset(tokens);
    stream.reset();  // before its context
    context = MakeContext(key, deadline);
    stream = router.Resume(context.get(), resume);
  }
}

// The name of a status code; gRPC's C++ library has none.
std::string Name(grpc::StatusCode code) {
  static const std::vector<std::string> names = {
      "OK",                 "CANCELLED",         "UNKNOWN",          "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED", "NOT_FOUND",
      "ALREADY_EXISTS",     "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",           "OUT_OF_RANGE",
      "UNIMPLEMENTED",      "INTERNAL",          "UNAVAILABLE",      "DATA_LOSS",          "UNAUTHENTICATED"};
  return names.at(code);
}

}  // namespace

int main(int count, char** values) {
  try {
    const Arguments arguments = ReadArguments(count, values);
    const auto router = InferenceService::NewStub(Connect(arguments.positionals[0], arguments.flags.at("ca")));
    const grpc::Status status = Answer(*router, arguments);
    if (status.ok()) return 0;
    std::cerr << "\nerror: " << Name(status.error_code()) << ": " << status.error_message()
              << "\nnext: " << NextStep(status) << "\n";
    return 1;
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << "; usage: client [flags, see ../README.md] ADDRESS PROMPT\n";
    return 2;
  }
}
