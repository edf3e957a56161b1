//! Frames: a length and that many bytes of JSON, cut out of a stream that arrives in any pieces.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// Bytes of the length before each frame.
pub const HEADER_BYTES: usize = 4;

/// Why a stream of frames cannot be read on, or a message cannot be sent. The stream is to be closed.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The announced length is above the bound of this stream.
    #[error("a frame of {length} bytes is announced; at most {bytes_max} are allowed here")]
    TooLong {
        /// As announced.
        length: u64,
        /// The bound.
        bytes_max: usize,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended in the middle of a frame, after {have} bytes of it")]
    Cut {
        /// Bytes that had arrived, header included.
        have: usize,
    },
    /// Not the JSON of a message of this stream; the source says where.
    #[error("a frame holds no message that this version knows")]
    Message(#[source] serde_json::Error),
}

/// Cuts frames out of bytes. It never takes memory for bytes that have not arrived.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    bytes_max: usize,
}

impl Decoder {
    /// A decoder that refuses frames of more than `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            bytes_max,
        }
    }

    /// Takes bytes as they arrived. Take out all frames before more are put in: that bounds what is held.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame's content; `None` until more bytes arrive. An error repeats: there is no way to find the next frame.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let announced = u32::from_be_bytes(*header);
        let length = usize::try_from(announced).unwrap_or(usize::MAX);
        if length > self.bytes_max {
            return Err(FrameError::TooLong {
                length: u64::from(announced),
                bytes_max: self.bytes_max,
            });
        }
        if self.buffer.len() - HEADER_BYTES < length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    /// The next whole message; `None` until more bytes arrive.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        self.next_frame()?.map(|content| decode(&content)).transpose()
    }

    /// To be asked when the stream has ended: whether it ended between frames.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.buffer.len() {
            0 => Ok(()),
            have => Err(FrameError::Cut { have }),
        }
    }
}

/// Reads one frame's content. JSON nested deeper than 128 is refused.
pub fn decode<T: DeserializeOwned>(content: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(content).map_err(FrameError::Message)
}

/// One frame, header included.
pub fn encode<T: Serialize>(message: &T, bytes_max: usize) -> Result<Bytes, FrameError> {
    let mut frame = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut frame, message).map_err(FrameError::Message)?;
    let length = frame.len() - HEADER_BYTES;
    let too_long = || FrameError::TooLong {
        length: length as u64,
        bytes_max,
    };
    if length > bytes_max {
        return Err(too_long());
    }
    let header = u32::try_from(length).map_err(|_| too_long())?.to_be_bytes();
    frame[..HEADER_BYTES].copy_from_slice(&header);
    Ok(Bytes::from(frame))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const MAX: usize = 64;

    fn drain(decoder: &mut Decoder) -> Result<Vec<Bytes>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn the_largest_length_that_can_be_announced_is_refused_before_a_byte_of_it_is_awaited() {
        let mut decoder = Decoder::new(4 << 20);
        decoder.push(&u32::MAX.to_be_bytes());
        assert!(matches!(
            decoder.next_frame(),
            Err(FrameError::TooLong {
                length: 0xffff_ffff,
                ..
            })
        ));
        decoder.push(b"more");
        assert!(decoder.next_frame().is_err());
    }

    #[test]
    fn a_frame_of_exactly_the_bound_passes_and_one_byte_more_does_not() {
        let at_bound = "x".repeat(MAX - 2);
        let frame = encode(&at_bound, MAX).unwrap();
        let mut decoder = Decoder::new(MAX);
        decoder.push(&frame);
        assert_eq!(decoder.next_message::<String>().unwrap(), Some(at_bound.clone()));
        assert!(matches!(
            encode(&format!("{at_bound}x"), MAX),
            Err(FrameError::TooLong { length: 65, .. })
        ));
        decoder.push(&65u32.to_be_bytes());
        assert!(decoder.next_frame().is_err());
    }

    #[test]
    fn a_stream_that_ends_in_a_frame_is_told_from_one_that_ends_after_it() {
        let frame = encode(&1, MAX).unwrap();
        let mut decoder = Decoder::new(MAX);
        decoder.push(&frame[..frame.len() - 1]);
        assert!(decoder.next_frame().unwrap().is_none());
        assert!(matches!(decoder.finish(), Err(FrameError::Cut { have: 4 })));
        decoder.push(&frame[frame.len() - 1..]);
        assert!(decoder.next_frame().unwrap().is_some());
        assert!(decoder.finish().is_ok());
    }

    #[test]
    fn json_that_is_ten_thousand_deep_is_refused() {
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(matches!(decode::<Value>(deep.as_bytes()), Err(FrameError::Message(_))));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
            messages in prop::collection::vec(".{0,12}", 0..8),
            cuts in prop::collection::vec(1usize..9, 1..40),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|m| encode(m, MAX).unwrap()).collect();
            let mut decoder = Decoder::new(MAX);
            let (mut out, mut rest, mut cut) = (Vec::new(), stream.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cut.next().unwrap()).min(rest.len()));
                decoder.push(piece);
                out.extend(drain(&mut decoder).unwrap().iter().map(|f| decode::<String>(f).unwrap()));
                rest = after;
            }
            prop_assert_eq!(out, messages);
            prop_assert!(decoder.finish().is_ok());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_hold_more_than_came(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(MAX);
            decoder.push(&bytes);
            let frames = drain(&mut decoder).unwrap_or_default();
            prop_assert!(frames.iter().all(|frame| frame.len() <= MAX));
            for frame in frames {
                let _ = decode::<crate::Up>(&frame);
                let _ = decode::<crate::Down>(&frame);
                let _ = decode::<crate::Peer>(&frame);
            }
        }
    }
}
