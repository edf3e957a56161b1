//! Writes initramfs archives: the "newc" form of cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same members give the same bytes: times and owners are zero, inode numbers count up.

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMBOLIC_LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. Parents must be added before their members.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    members: u32,
}

impl Archive {
    /// Adds a directory, mode 0755.
    pub(crate) fn directory(&mut self, path: &str) {
        self.member(path, DIRECTORY | 0o755, &[], (0, 0));
    }

    /// Adds a file with its permission bits.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.member(path, REGULAR | permissions, content, (0, 0));
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.member(path, SYMBOLIC_LINK | 0o777, target.as_bytes(), (0, 0));
    }

    /// Adds a character device, mode 0600.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.member(path, CHARACTER_DEVICE | 0o600, &[], (major, minor));
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn member(&mut self, path: &str, mode: u32, content: &[u8], (major, minor): (u32, u32)) {
        self.members += 1;
        let links = if mode & DIRECTORY == DIRECTORY && mode & REGULAR != REGULAR {
            2
        } else {
            1
        };
        let fields = [
            self.members,
            mode,
            0, // owner
            0, // group
            links,
            0, // modification time
            content.len() as u32,
            0, // device of the file system, two fields
            0,
            major,
            minor,
            path.len() as u32 + 1,
            0, // checksum, unused in this form
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents are padded to four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Run;
    use std::time::Duration;

    /// busybox is what the guest runs and reads the form as the kernel does.
    #[test]
    fn another_reader_sees_the_members_as_written() {
        let mut archive = Archive::default();
        archive.directory("etc");
        archive.file("etc/odd", 0o640, b"12345");
        archive.link("init", "bin/busybox");
        archive.device("console", 5, 1);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.cpio");
        std::fs::write(&path, archive.finish()).unwrap();
        let listing = Run::new("busybox", Duration::from_secs(20))
            .arg("cpio")
            .arg("-t")
            .arg("-v")
            .arg("-F")
            .arg(&path);
        let listing = String::from_utf8(listing.output().unwrap()).unwrap();
        for expected in [
            "drwxr-xr-x",
            "-rw-r-----",
            "etc/odd",
            "init -> bin/busybox",
            "crw-------",
        ] {
            assert!(listing.contains(expected), "{expected} is missing in:\n{listing}");
        }
    }
}
