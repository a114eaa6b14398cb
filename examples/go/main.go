// Command talk renders a WAV file of 16-bit PCM to H.264 (Annex B):
//
//	go run . [-target HOST:PORT] [-break-at FRAME] [-interrupt-after SECONDS] speech.wav face.png out.h264
//
// With -break-at the connection breaks once that frame is there, and the stream resumes. With -interrupt-after the
// stream is live: the speech is sent as it is spoken, interrupted, and followed by its first second.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"time"

	avatarv1 "example.com/talk/gen/avatar/v1"
	"google.golang.org/grpc/metadata"
)

// piecesHz is the number of pieces that a second of speech is sent in.
const piecesHz = 25

var (
	target         = flag.String("target", "127.0.0.1:7000", "HOST:PORT of the gateway")
	breakAt        = flag.Uint64("break-at", 0, "break the connection at this frame, if not 0")
	interruptAfter = flag.Float64("interrupt-after", 0, "seconds of speech before an interrupt; offline without it")
)

func main() {
	log.SetFlags(0)
	flag.Parse()
	if flag.NArg() != 3 {
		log.Fatal("error: give a WAV file, a picture and the name of the video")
	}
	if err := talk(flag.Arg(0), flag.Arg(1), flag.Arg(2)); err != nil {
		found := detailsOf(err)
		for _, violation := range found.violations {
			log.Printf("%s: %s", violation.Field, violation.Description)
		}
		log.Fatalf("error: %s %v", found.reason, err)
	}
}

// talk renders a WAV file with a portrait to a file of H.264.
func talk(speech, portrait, out string) error {
	samples, format, err := readWav(speech)
	if err != nil {
		return err
	}
	picture, err := os.ReadFile(portrait)
	if err != nil {
		return err
	}
	connection, err := connect(*target)
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx := context.Background()
	if token := os.Getenv("AVATAR_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	client := avatarv1.NewAvatarServiceClient(connection)
	reference, err := client.CreateReference(ctx, &avatarv1.CreateReferenceRequest{Picture: picture})
	if err != nil {
		return err
	}
	if notice := reference.Reference.Notice; notice != "" {
		fmt.Println("notice:", notice)
	}
	created, err := client.CreateSession(ctx, &avatarv1.CreateSessionRequest{ReferenceId: reference.Reference.Id})
	if err != nil {
		return err
	}
	session := created.Session
	defer client.DeleteSession(ctx, &avatarv1.DeleteSessionRequest{SessionId: session.Id})

	mode := avatarv1.OpenAvatar_MODE_OFFLINE
	if *interruptAfter > 0 {
		mode = avatarv1.OpenAvatar_MODE_LIVE
	}
	s, err := openStream(ctx, client, &avatarv1.OpenAvatar{
		SessionId: session.Id,
		Audio:     format,
		Mode:      mode,
		Output:    &avatarv1.VideoOutput{Encoding: avatarv1.VideoEncoding_VIDEO_ENCODING_H264, TakesChunks: true},
	})
	if err != nil {
		return err
	}
	go speak(s, samples, format)

	file, err := os.Create(out)
	if err != nil {
		return err
	}
	defer file.Close()
	numFrames := 0
	for {
		response, err := s.next(ctx)
		if err != nil {
			return err
		}
		frames := response.GetChunk().GetFrames()
		if frame := response.GetFrame(); frame != nil {
			frames = []*avatarv1.VideoFrame{frame}
		}
		for _, frame := range frames { // show frame.Data at frame.PtsUs
			if _, err := file.Write(frame.Data); err != nil {
				return err
			}
			numFrames++
			if *breakAt > 0 && frame.Index == *breakAt {
				s.cancel()
			}
		}
		switch part := response.Part.(type) {
		case *avatarv1.StreamAvatarResponse_Interrupted:
			position := float64(part.Interrupted.PositionUs) / 1e6
			fmt.Printf("interrupted at %.2f s, speaking: %t\n", position, part.Interrupted.WasSpeaking)
		case *avatarv1.StreamAvatarResponse_Event:
			fmt.Println("event:", part.Event)
		case *avatarv1.StreamAvatarResponse_Closed:
			fmt.Printf("%d frames of %d x %d, %d resumes\n", numFrames, session.Video.Width, session.Video.Height, s.numResumes)
			return nil
		}
	}
}

// speak sends the speech, and with an interrupt its first second as a second turn.
func speak(s *stream, samples []byte, format *avatarv1.AudioFormat) {
	pieceBytes := 2 * int(format.NumChannels) * int(format.RateHz) / piecesHz
	send := func(samples []byte) {
		for start := 0; start < len(samples); start += pieceBytes {
			piece := samples[start:min(start+pieceBytes, len(samples))]
			s.send(&avatarv1.StreamAvatarRequest{Part: &avatarv1.StreamAvatarRequest_Audio{
				Audio: &avatarv1.AudioPiece{Data: piece},
			}})
			if *interruptAfter > 0 {
				time.Sleep(time.Second / piecesHz)
			}
		}
	}
	if *interruptAfter > 0 {
		send(samples[:min(len(samples), int(*interruptAfter*piecesHz)*pieceBytes)])
		s.send(&avatarv1.StreamAvatarRequest{Part: &avatarv1.StreamAvatarRequest_Interrupt{}})
		samples = samples[:min(len(samples), piecesHz*pieceBytes)]
	}
	send(samples)
	s.send(&avatarv1.StreamAvatarRequest{Part: &avatarv1.StreamAvatarRequest_Close{}})
}

// readWav returns the samples of a WAV file of 16-bit PCM, interleaved, and their format.
func readWav(path string) ([]byte, *avatarv1.AudioFormat, error) {
	file, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	format := &avatarv1.AudioFormat{}
	for at := 12; at+8 <= len(file) && string(file[:4]) == "RIFF"; {
		size := int(binary.LittleEndian.Uint32(file[at+4:]))
		chunk := file[at+8 : min(at+8+size, len(file))]
		switch name := string(file[at : at+4]); {
		case name == "fmt " && len(chunk) >= 16:
			if binary.LittleEndian.Uint16(chunk) == 1 && binary.LittleEndian.Uint16(chunk[14:]) == 16 {
				format.Encoding = avatarv1.SampleEncoding_SAMPLE_ENCODING_PCM16
			}
			format.NumChannels = uint32(binary.LittleEndian.Uint16(chunk[2:]))
			format.RateHz = binary.LittleEndian.Uint32(chunk[4:])
		case name == "data" && format.Encoding == avatarv1.SampleEncoding_SAMPLE_ENCODING_PCM16:
			return chunk, format, nil
		}
		at += 8 + size + size%2
	}
	return nil, nil, errors.New(path + " is no WAV file of 16-bit PCM")
}

// min returns the smaller of two numbers; Go has it from 1.21 on.
func min(a, b int) int {
	if a < b {
		return a
	}
	return b
}
