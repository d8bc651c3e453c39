// Streams one answer of a starmesh cluster to the terminal. What it shows, and its flags: ../README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	starmesh "starmesh.example/client/starmesh/v1"
)

const (
	resumes       = 8 // tries to go on after the last message that came
	callTimeout   = 10 * time.Second
	firstPause    = 100 * time.Millisecond
	longestPause  = time.Second
	keepaliveTime = 20 * time.Second
)

var (
	tokens       = flag.Int("tokens", 256, "output tokens at most")
	requestID    = flag.String("request-id", "", "name of the request; empty: the router draws one")
	deadline     = flag.Float64("deadline", 300, "seconds that the request may take")
	resumeWindow = flag.Float64("resume-window", 10, "seconds that the router keeps the request when its stream breaks")
	cancelAfter  = flag.Int("cancel-after", 0, "output tokens after which to cancel; 0: never")
	ca           = flag.String("ca", "", "file with the CA that has signed the router's certificate; empty: no TLS")
	apiKey       = flag.String("api-key", os.Getenv("STARMESH_API_KEY"), "key of the router")
)

// stream is what Generate and Resume return.
type stream interface {
	Recv() (*starmesh.GenerateResponse, error)
}

func connect(address string) (*grpc.ClientConn, error) {
	transport := grpc.WithInsecure()
	if *ca != "" {
		tls, err := credentials.NewClientTLSFromFile(*ca, "")
		if err != nil {
			return nil, err
		}
		transport = grpc.WithTransportCredentials(tls)
	}
	// Notices within half a minute that a silent network has lost the router.
	alive := keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTime / 2}
	return grpc.Dial(address, transport, grpc.WithKeepaliveParams(alive))
}

// retryDelay returns the delay of RetryInfo; ok is false without one.
func retryDelay(err error) (delay time.Duration, ok bool) {
	for _, detail := range status.Convert(err).Details() {
		if retry, is := detail.(*errdetails.RetryInfo); is {
			return time.Duration(retry.RetryDelay.Seconds)*time.Second + time.Duration(retry.RetryDelay.Nanos), true
		}
	}
	return 0, false
}

// nextStep says what a person does about an error, in one line.
func nextStep(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if bad, is := detail.(*errdetails.BadRequest); is {
			var changes []string
			for _, violation := range bad.FieldViolations {
				changes = append(changes, fmt.Sprintf("change %s: %s", violation.Field, violation.Description))
			}
			return strings.Join(changes, "; ")
		}
	}
	if delay, ok := retryDelay(err); ok {
		return fmt.Sprintf("ask again after %g s", delay.Seconds())
	}
	switch status.Code(err) {
	case codes.Unauthenticated:
		return "give a valid key with --api-key"
	case codes.PermissionDenied:
		return "use a key that may do this"
	case codes.DeadlineExceeded:
		return "what was printed stays valid; allow more time with --deadline"
	case codes.Unavailable:
		return "see whether a router listens there, and whether it wants TLS (--ca)"
	default:
		return "see the message"
	}
}

// answer streams the answer to prompt, through broken connections.
func answer(ctx context.Context, client starmesh.InferenceServiceClient, prompt string) error {
	callCtx, endCall := context.WithCancel(ctx)
	defer endCall()
	var (
		call      stream
		err       error
		id        = *requestID
		received  int32
		resumed   int
		cancelled bool
	)
	call, err = client.Generate(callCtx, &starmesh.GenerateRequest{
		RequestId: id,
		Input: &starmesh.GenerateRequest_Chat{Chat: &starmesh.Chat{
			Messages: []*starmesh.ChatMessage{{Role: "user", Content: prompt}},
		}},
		Sampling:     &starmesh.SamplingParams{MaxOutputTokens: proto.Int32(int32(*tokens))},
		ResumeWindow: durationpb.New(time.Duration(*resumeWindow * float64(time.Second))),
	})
	for tries, pause := 0, firstPause; ; {
		var response *starmesh.GenerateResponse
		if err == nil {
			response, err = call.Recv()
		}
		switch {
		case err == nil:
			tries, pause = 0, firstPause
		case errors.Is(err, io.EOF):
			return nil
		case cancelled && status.Code(err) == codes.Canceled:
			fmt.Fprintf(os.Stderr, "\n[cancelled by ending the call: %d output tokens]\n", received)
			return nil
		default:
			// The router keeps the request for the resume window: go on behind the last token that came.
			_, toldToWait := retryDelay(err)
			broken := status.Code(err) == codes.Unavailable && !toldToWait
			if !broken || *resumeWindow == 0 || received == 0 || tries == resumes {
				return err
			}
			tries++
			resumed++
			time.Sleep(pause)
			pause = min(2*pause, longestPause)
			call, err = client.Resume(callCtx, &starmesh.ResumeRequest{RequestId: id, Offset: received})
			continue
		}
		id = response.RequestId
		received = response.Offset + int32(len(response.TokenIds))
		fmt.Print(response.Text)
		if response.FinishReason != starmesh.FinishReason_FINISH_REASON_UNSPECIFIED {
			reason, usage := strings.TrimPrefix(response.FinishReason.String(), "FINISH_REASON_"), response.Usage
			fmt.Fprintf(os.Stderr, "\n[%s: %d prompt tokens, %d output tokens, %d recoveries, %d migrations, %d resumes]\n",
				reason, usage.PromptTokens, usage.OutputTokens, usage.Recoveries, usage.Migrations, resumed)
		} else if *cancelAfter > 0 && int(received) >= *cancelAfter && !cancelled {
			cancelled = true
			if *resumeWindow == 0 {
				endCall() // enough where no stream of the request can follow
			} else if err := cancelRequest(ctx, client, id); err != nil {
				return err
			}
		}
	}
}

func cancelRequest(ctx context.Context, client starmesh.InferenceServiceClient, id string) error {
	ctx, done := context.WithTimeout(ctx, callTimeout)
	defer done()
	_, err := client.Cancel(ctx, &starmesh.CancelRequest{RequestId: id})
	if status.Code(err) == codes.NotFound { // it has just ended
		return nil
	}
	return err
}

func min(a, b time.Duration) time.Duration {
	if a < b {
		return a
	}
	return b
}

func main() {
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: client [flags, see ../README.md] ADDRESS PROMPT")
		os.Exit(2)
	}
	connection, err := connect(flag.Arg(0))
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v; see ../README.md\n", err)
		os.Exit(2)
	}
	defer connection.Close()
	ctx, done := context.WithTimeout(context.Background(), time.Duration(*deadline*float64(time.Second)))
	defer done()
	if *apiKey != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+*apiKey)
	}
	if err := answer(ctx, starmesh.NewInferenceServiceClient(connection), flag.Arg(1)); err != nil {
		name := code.Code(status.Code(err)) // as all languages but Go write it
		fmt.Fprintf(os.Stderr, "\nerror: %v: %s\nnext: %s\n", name, status.Convert(err).Message(), nextStep(err))
		os.Exit(1)
	}
}
