//! Disk images: what reaches outside itself, and what is not what it says.

use anyhow::{Context, Result, ensure};
use e2e::api::Api;
use e2e::fixture::Shared;
use e2e::lab::Lab;
use e2e::run::run;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn a_disk_image_that_reaches_outside_itself_is_refused_here(shared: &mut Shared) -> Result<()> {
    for image in Images::make(shared.cluster.lab())?.all {
        let (path, format) = (image.path.to_string_lossy(), image.format);
        let ended = shared
            .cluster
            .attempt(&["template", "import", "bad", &path, "--format", format])?;
        ended.refused(1).with_context(|| image.what.to_owned())?;
    }
    let pipe = shared.cluster.lab().dir().join("pipe.raw");
    run(&["mkfifo", &pipe.to_string_lossy()])?;
    shared
        .cluster
        .attempt(&["template", "import", "bad", &pipe.to_string_lossy()])?
        .refused(1)?;
    shared
        .cluster
        .attempt(&["template", "import", "bad", "/no/such.raw"])?
        .refused(1)?;
    shared
        .cluster
        .attempt(&["template", "import", "bad", "/etc/passwd"])?
        .refused(2)?;
    shared
        .cluster
        .attempt(&["template", "show", "bad"])?
        .refused(4)
        .map(drop)
}

pub(crate) fn a_disk_image_that_is_not_what_it_says_is_refused_by_the_host_too(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let before = files(&shared.cluster.lab().shared().join("blobs"))?;
    for image in Images::make(shared.cluster.lab())?.all {
        let bytes = fs::read(&image.path).with_context(|| format!("cannot read {}", image.path.display()))?;
        let digest = api.upload(&bytes)?;
        let blob = json!({ "digest": digest, "size_bytes": bytes.len() });
        let disk = json!({ "blob": blob, "format": image.format, "size_bytes": 1 << 20 });
        let content = json!({ "boot": { "kind": "bios" }, "disk": disk, "memory_mib_min": 64 });
        let reply = api.ask(
            "POST",
            "/v1/templates",
            &[],
            &json!({ "name": "bad", "content": content }).to_string(),
        )?;
        let begun = reply.json()?;
        let id = begun["id"]
            .as_str()
            .with_context(|| format!("{}: {begun}", image.what))?;
        let ended = shared.ended(id, 60)?;
        ensure!(ended["state"]["state"] == "failed", "{}: {ended}", image.what);
        let why = ended["state"]["reason"]["message"].as_str().unwrap_or_default();
        ensure!(
            !why.is_empty() && !why.contains('\n'),
            "{}: its reason is {why:?}",
            image.what
        );
        shared
            .cluster
            .attempt(&["vm", "create", "never", "--template", "bad"])?
            .refused(5)?;
        shared.cluster.json(&["template", "delete", "bad", "--wait"])?;
    }
    let missing = json!({ "digest": "0".repeat(64), "size_bytes": 1 << 20 });
    let disk = json!({ "blob": missing, "format": "raw", "size_bytes": 1 << 20 });
    let content = json!({ "boot": { "kind": "bios" }, "disk": disk, "memory_mib_min": 64 });
    let reply = api.ask(
        "POST",
        "/v1/templates",
        &[],
        &json!({ "name": "gone", "content": content }).to_string(),
    )?;
    ensure!(
        (400..500).contains(&reply.status),
        "a template of bytes that nobody has is answered with {}",
        reply.status
    );
    let after = files(&shared.cluster.lab().shared().join("blobs"))?;
    ensure!(
        after == before,
        "refused images left {:?}",
        after.difference(&before).collect::<Vec<_>>()
    );
    Ok(())
}

/// Paths of all files below a directory.
fn files(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry.context("cannot list a directory")?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    Ok(found)
}

/// A file that no template may be made of.
struct Image {
    what: &'static str,
    path: PathBuf,
    format: &'static str,
}

/// Files that no template may be made of.
struct Images {
    dir: PathBuf,
    all: Vec<Image>,
}

impl Images {
    fn make(lab: &Lab) -> Result<Images> {
        let dir = lab.dir().join("images");
        if dir.exists() {
            fs::remove_dir_all(&dir).context("cannot remove old images")?;
        }
        fs::create_dir(&dir).context("cannot make a directory for images")?;
        let mut images = Images { dir, all: Vec::new() };
        images.made_by_qemu()?;
        images.patched()?;
        Ok(images)
    }

    fn add(&mut self, what: &'static str, file: &str, format: &'static str) -> PathBuf {
        let path = self.dir.join(file);
        self.all.push(Image {
            what,
            path: path.clone(),
            format,
        });
        path
    }

    fn made_by_qemu(&mut self) -> Result<()> {
        let create = |path: &Path, more: &[&str]| {
            let path = path.to_string_lossy();
            let argv = [&["qemu-img", "create", "-q", "-f", "qcow2"], more, &[&path, "1M"]].concat();
            run(&argv).map(drop)
        };
        let path = self.add("backing file", "backing.qcow2", "qcow2");
        create(&path, &["-u", "-b", "/etc/passwd", "-F", "raw"])?;
        let path = self.add("backing by nbd", "nbd.qcow2", "qcow2");
        create(&path, &["-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw"])?;
        let path = self.add("backing by json", "json.qcow2", "qcow2");
        create(
            &path,
            &[
                "-u",
                "-b",
                r#"json:{"driver":"file","filename":"/etc/passwd"}"#,
                "-F",
                "raw",
            ],
        )?;
        let data = self.dir.join("data");
        let option = format!("data_file={},data_file_raw=on", data.display());
        let path = self.add("data file", "data.qcow2", "qcow2");
        create(&path, &["-o", &option])?;
        let path = self.add("raw that begins as qcow2", "header.raw", "raw");
        create(&path, &[])?;
        let path = self.add("qcow2 that is raw", "zeros.qcow2", "qcow2");
        fs::write(&path, vec![0; 1 << 20]).context("cannot write an image")
    }

    fn patched(&mut self) -> Result<()> {
        let good = self.dir.join("good");
        run(&["qemu-img", "create", "-q", "-f", "qcow2", &good.to_string_lossy(), "1M"])?;
        let good = fs::read(&good).context("cannot read an image")?;
        // Offsets of the header (QEMU, docs/interop/qcow2.rst); big-endian.
        for (what, file, at, bytes) in [
            ("cluster_bits 63", "bits.qcow2", 20, &63_u32.to_be_bytes()[..]),
            ("60 PiB", "virtual.qcow2", 24, &(60_u64 << 50).to_be_bytes()),
            ("L1 past the end", "l1.qcow2", 40, &(1_u64 << 40).to_be_bytes()),
            ("2^32-1 snapshots", "snapshots.qcow2", 60, &u32::MAX.to_be_bytes()),
            (
                "unknown incompatible bit",
                "feature.qcow2",
                72,
                &(1_u64 << 40).to_be_bytes(),
            ),
            ("header_length 2^32-1", "length.qcow2", 100, &u32::MAX.to_be_bytes()),
        ] {
            let mut image = good.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            fs::write(self.add(what, file, "qcow2"), image).context("cannot write an image")?;
        }
        fs::write(
            self.add("truncated", "truncated.qcow2", "qcow2"),
            &good[..good.len() / 2],
        )
        .context("cannot write an image")?;
        fs::write(self.add("header alone", "head.qcow2", "qcow2"), &good[..64]).context("cannot write an image")?;
        fs::write(self.add("half a sector", "half.raw", "raw"), [0; 700]).context("cannot write an image")
    }
}
