// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// emptyType is the media type of what is {} because a manifest must have it.
const emptyType types.MediaType = "application/vnd.oci.empty.v1+json"

// part is the image of one platform.
type part struct {
	platform v1.Platform
	image    v1.Image
	sbom     []byte
}

func (r release) part(platform v1.Platform, binary string) (part, error) {
	modules, err := r.modulesOf(binary, platform.Architecture)
	if err != nil {
		return part{}, err
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		return part{}, err
	}
	p := part{platform: platform}
	if p.sbom, err = r.sbom(content, modules); err != nil {
		return part{}, err
	}
	layer, err := r.layer(content, modules)
	if err != nil {
		return part{}, err
	}
	p.image, err = r.image(platform, layer)
	return p, err
}

// annotations are those that the image specification defines.
func (r release) annotations() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "fairlead",
		"org.opencontainers.image.description": "Sends connections for Kubernetes Services to their pods, in place of kube-proxy",
		"org.opencontainers.image.source":      "https://" + ourPath,
		"org.opencontainers.image.version":     r.version,
		"org.opencontainers.image.revision":    r.revision,
		"org.opencontainers.image.licenses":    ourLicence,
		"org.opencontainers.image.created":     r.created.Format(time.RFC3339),
	}
}

// image returns the image of one platform. It runs as root: loading BPF programs
// and entering network namespaces take that.
func (r release) image(platform v1.Platform, layer v1.Layer) (v1.Image, error) {
	created := v1.Time{Time: r.created}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	base, err := mutate.ConfigFile(base, &v1.ConfigFile{
		OS: platform.OS, Architecture: platform.Architecture, Created: created,
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: []string{"/" + binDir + "/fairlead"},
			Env:        []string{"PATH=/" + binDir}, // for those who only name fairlead
			User:       "0:0",
			WorkingDir: "/",
			Labels:     r.annotations(),
		},
	})
	if err != nil {
		return nil, err
	}
	image, err := mutate.Append(base, mutate.Addendum{
		Layer: layer, History: v1.History{Created: created, CreatedBy: "make image"},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(image, r.annotations()).(v1.Image), nil
}

// index returns the image of all platforms. Behind them come their SBOMs, each
// referring to its image: so they go wherever all of the index goes, and
// registries list them as referrers. Their platform, which nobody asks for, keeps
// engines from taking them for something to run.
func (r release) index(parts []part) (v1.ImageIndex, error) {
	var images, sboms []mutate.IndexAddendum
	for _, p := range parts {
		image, err := partial.Descriptor(p.image)
		if err != nil {
			return nil, err
		}
		images = append(images, mutate.IndexAddendum{
			Add: p.image, Descriptor: v1.Descriptor{Platform: &p.platform},
		})
		sbom, err := attachment(*image, sbomType, p.sbom)
		if err != nil {
			return nil, err
		}
		sboms = append(sboms, mutate.IndexAddendum{
			Add:        sbom,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}, ArtifactType: sbomType},
		})
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	index = mutate.AppendManifests(index, append(images, sboms...)...)
	return mutate.Annotations(index, r.annotations()).(v1.ImageIndex), nil
}

// writeLayout writes the index to a directory that has nothing else in it then.
func (r release) writeLayout(dir string, index v1.ImageIndex) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": r.version,
		// What containerd and podman call it when they have loaded it.
		"io.containerd.image.name": "localhost/fairlead:" + r.version,
	}))
}

// artifact is a document that refers to an image.
type artifact struct {
	manifest []byte
	document v1.Layer
}

// attachment returns a document as a manifest that refers to subject.
func attachment(subject v1.Descriptor, mediaType types.MediaType, content []byte) (v1.Image, error) {
	document := static.NewLayer(content, mediaType)
	layer, err := partial.Descriptor(document)
	if err != nil {
		return nil, err
	}
	config, err := partial.Descriptor(static.NewLayer([]byte("{}"), emptyType))
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  string(mediaType),
		Config:        *config,
		Layers:        []v1.Descriptor{*layer},
		Subject: &v1.Descriptor{
			MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size,
		},
	})
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(&artifact{manifest, document})
}

// The methods make an artifact what the library calls an image.

func (a *artifact) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

func (a *artifact) RawManifest() ([]byte, error) { return a.manifest, nil }

func (a *artifact) RawConfigFile() ([]byte, error) { return []byte("{}"), nil }

func (a *artifact) LayerByDigest(hash v1.Hash) (partial.CompressedLayer, error) {
	digest, err := a.document.Digest()
	if err != nil {
		return nil, err
	}
	if hash != digest {
		return nil, fmt.Errorf("no layer %s", hash)
	}
	return a.document, nil
}
