//! Lets a stranger's disk image into a pool: vetted, then converted, so that nothing of its structure survives.

use crate::pool::{BLOB_MODE, BLOBS, Pool, PoolError};
use crate::process::{Limits, Run, RunError};
use crate::vet::{ImageInfo, Refusal, vet};
use model::storage::Format;
use model::template::Blob;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

/// qemu-img keeps its second-level table cache and a few buffers; it needs far less than this.
const ADDRESS_SPACE_BYTES: u64 = 2 << 30;
/// `SIGXCPU` and `SIGXFSZ` of signal(7): the limits on processor time and file size.
const SIGXCPU: i32 = 24;
const SIGXFSZ: i32 = 25;

/// What one import may use.
#[derive(Clone, Copy, Debug)]
pub struct ImportLimits {
    /// The largest virtual size, in bytes.
    pub virtual_bytes: u64,
    /// The largest result, in bytes: an image made small by compression or sharing may grow no further.
    pub output_bytes: u64,
    /// How long the conversion may take; of processor time too.
    pub deadline: Duration,
}

/// An image that is now a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The blob; its format is qcow2, ours.
    pub blob: Blob,
    /// Size that a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// What the original said of itself.
    pub original: ImageInfo,
}

/// Why an image was not imported. Nothing of it is left in the pool.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The image is not sound.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It would be too large.
    #[error("the image unpacks to more than the allowed {limit} bytes; make it smaller, or ask for a higher limit")]
    TooLarge {
        /// The limit on the result.
        limit: u64,
    },
    /// It took too long.
    #[error("converting the image took more than {limit_s} s; convert it to a plain qcow2 first")]
    TooSlow {
        /// The limit.
        limit_s: u64,
    },
    /// qemu-img failed.
    #[error("the image could not be converted")]
    Convert(#[source] RunError),
    /// The pool's own files failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl Pool {
    /// Vets the image at `source`, a file that only we can write, and keeps a conversion of it as a qcow2 blob.
    ///
    /// `progress` is told how much of the image is converted: bytes of its virtual size, and that size.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn import(
        &self,
        source: &Path,
        declared: Format,
        limits: ImportLimits,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Imported, ImportError> {
        let original = vet(source, declared)?;
        let virtual_bytes = original.virtual_bytes.next_multiple_of(512);
        if virtual_bytes > limits.virtual_bytes {
            return Err(Refusal::VirtualSize {
                bytes: virtual_bytes,
                limit: limits.virtual_bytes,
            }
            .into());
        }
        // An absolute path: qemu-img would read `nbd:...` or `json:...` in a relative one as something else.
        let source = source.canonicalize().map_err(Refusal::Unreadable)?;
        let incoming = self.incoming(0)?;
        let limit_s = limits.deadline.as_secs().max(1);
        let rlimits = Limits {
            address_space_bytes: ADDRESS_SPACE_BYTES,
            cpu_s: limit_s,
            file_bytes: limits.output_bytes,
        };
        let run = Run::new("qemu-img", limits.deadline)
            .limits(rlimits)
            .arg("convert")
            .arg("-p");
        let run = run
            .arg("-f")
            .arg(declared.as_str())
            .arg("-O")
            .arg("qcow2")
            .arg(source)
            .arg(incoming.path());
        let converted = run.output_seen(&mut |piece| {
            if let Some(percent) = percent(piece) {
                progress((virtual_bytes as f64 * percent / 100.0) as u64, virtual_bytes);
            }
        });
        converted.map_err(|error| explain(error, limits.output_bytes, limit_s))?;
        // What came out is judged like what went in.
        let ours = vet(&incoming.path(), Format::Qcow2)?;
        let blob = incoming.rehash()?;
        incoming.keep(BLOBS, &blob.digest.to_string(), BLOB_MODE)?;
        Ok(Imported {
            blob,
            virtual_bytes: ours.virtual_bytes,
            original,
        })
    }
}

/// The last whole figure in `    (12.34/100%)\r`, as `qemu-img -p` prints it.
pub(crate) fn percent(piece: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(piece).ok()?;
    let (_, figure) = text.rsplit_once('(')?;
    let (figure, _) = figure.split_once("/100%)")?;
    figure.parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

/// Which limit qemu-img ran into, if any.
fn explain(error: RunError, limit: u64, limit_s: u64) -> ImportError {
    match &error {
        RunError::Deadline { .. } => ImportError::TooSlow { limit_s },
        RunError::Failed { status, complaint, .. } => match status.signal() {
            Some(SIGXCPU) => ImportError::TooSlow { limit_s },
            Some(SIGXFSZ) => ImportError::TooLarge { limit },
            _ if complaint.contains("File too large") => ImportError::TooLarge { limit },
            _ => ImportError::Convert(error),
        },
        _ => ImportError::Convert(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_of_qemu_img_is_read() {
        assert_eq!(percent(b"    (0.00/100%)\r    (12.50/100%)\r"), Some(12.5));
        assert_eq!(percent(b"    (12.5"), None);
        assert_eq!(percent(b"(NaN/100%)"), None);
    }
}
