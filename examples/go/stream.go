package main

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	avatarv1 "example.com/talk/gen/avatar/v1"
)

// retryDelay is the time between attempts to resume.
const retryDelay = 200 * time.Millisecond

// details is the content of an error's status; reason is empty if gRPC itself ended the call.
type details struct {
	reason     string
	metadata   map[string]string
	violations []*errdetails.BadRequest_FieldViolation
	retry      time.Duration
}

// detailsOf returns the details of an error; gRPC receives them as the metadata grpc-status-details-bin.
func detailsOf(err error) (found details) {
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			found.reason, found.metadata = detail.Reason, detail.Metadata
		case *errdetails.BadRequest:
			found.violations = detail.FieldViolations
		case *errdetails.RetryInfo:
			found.retry = detail.RetryDelay.AsDuration()
		}
	}
	return found
}

// isLost reports whether an error is a lost connection, and not an answer of the gateway.
func isLost(err error) bool {
	if errors.Is(err, io.EOF) {
		return true
	}
	switch status.Code(err) {
	case codes.Canceled, codes.Unknown, codes.DeadlineExceeded, codes.Internal, codes.Unavailable:
		return detailsOf(err).reason == ""
	}
	return false
}

// stream is an open stream that resumes after its connection breaks. One goroutine sends while another calls next.
type stream struct {
	client    avatarv1.AvatarServiceClient
	opening   *avatarv1.OpenAvatar
	resumeFor time.Duration

	call       avatarv1.AvatarService_StreamAvatarClient
	cancel     context.CancelFunc
	nextFrame  uint64
	nextEvent  uint64
	numResumes int

	mu      sync.Mutex
	changed *sync.Cond
	sent    []*avatarv1.StreamAvatarRequest // a stream of hours drops those that num_messages has counted
}

// openStream opens a session's stream.
func openStream(
	ctx context.Context, client avatarv1.AvatarServiceClient, opening *avatarv1.OpenAvatar,
) (*stream, error) {
	capabilities, err := client.GetCapabilities(ctx, &avatarv1.GetCapabilitiesRequest{})
	if err != nil {
		return nil, err
	}
	resumeFor := time.Duration(capabilities.ResumeS * float64(time.Second))
	s := &stream{client: client, opening: opening, resumeFor: resumeFor}
	s.changed = sync.NewCond(&s.mu)
	opened, err := s.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	s.nextFrame = opened.Session.NextFrame
	return s, nil
}

// open opens a call, and sends the messages that the gateway did not receive.
func (s *stream) open(ctx context.Context, resume *avatarv1.ResumeAvatar) (*avatarv1.AvatarOpened, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "avatar-session", s.opening.SessionId))
	call, err := s.client.StreamAvatar(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	opening := proto.Clone(s.opening).(*avatarv1.OpenAvatar)
	opening.Resume = resume
	// An error of Send is io.EOF; Recv returns the status.
	_ = call.Send(&avatarv1.StreamAvatarRequest{Part: &avatarv1.StreamAvatarRequest_Open{Open: opening}})
	response, err := call.Recv()
	if err != nil {
		cancel()
		return nil, err
	}
	s.call, s.cancel = call, cancel
	go s.write(call, int(response.GetOpened().NumMessages))
	return response.GetOpened(), nil
}

// write sends the messages from a number on until the call ends.
func (s *stream) write(call avatarv1.AvatarService_StreamAvatarClient, number int) {
	go func() {
		<-call.Context().Done()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed.Broadcast()
	}()
	for ; ; number++ {
		s.mu.Lock()
		for number >= len(s.sent) && call.Context().Err() == nil {
			s.changed.Wait()
		}
		if call.Context().Err() != nil {
			s.mu.Unlock()
			return
		}
		request := s.sent[number]
		s.mu.Unlock()
		if call.Send(request) != nil {
			return
		}
	}
}

// send queues a message.
func (s *stream) send(request *avatarv1.StreamAvatarRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, request)
	s.changed.Broadcast()
}

// next returns the gateway's next message that was not there before. It resumes the stream if its connection is lost.
func (s *stream) next(ctx context.Context) (*avatarv1.StreamAvatarResponse, error) {
	for {
		response, err := s.call.Recv()
		switch {
		case err != nil && !isLost(err):
			return nil, err
		case err != nil:
			if err := s.resume(ctx); err != nil {
				return nil, err
			}
			continue
		}
		switch part := response.Part.(type) {
		case *avatarv1.StreamAvatarResponse_Frame:
			s.nextFrame = part.Frame.Index + uint64(part.Frame.NumFrames)
		case *avatarv1.StreamAvatarResponse_Chunk:
			for _, frame := range part.Chunk.Frames {
				s.nextFrame = frame.Index + uint64(frame.NumFrames)
			}
		case *avatarv1.StreamAvatarResponse_Event:
			if part.Event.Number < s.nextEvent {
				continue
			}
			s.nextEvent = part.Event.Number + 1
		}
		return response, nil
	}
}

// resume opens the stream again, until the gateway no longer keeps the session.
func (s *stream) resume(ctx context.Context) error {
	s.cancel()
	for end := time.Now().Add(s.resumeFor); ; time.Sleep(retryDelay) {
		_, err := s.open(ctx, &avatarv1.ResumeAvatar{NextFrame: s.nextFrame, NextEvent: s.nextEvent})
		if err == nil {
			s.numResumes++
			return nil
		}
		switch detailsOf(err).reason {
		case "NO_CAPACITY", "SESSION_BUSY", "STAGE_LOST", "STORE_UNAVAILABLE":
		default:
			if !isLost(err) {
				return err
			}
		}
		if time.Now().After(end) {
			return err
		}
	}
}
