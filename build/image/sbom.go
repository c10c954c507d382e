// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
)

// sbomType is the media type of a CycloneDX document in JSON.
const sbomType = "application/vnd.cyclonedx+json"

// sbom describes a binary as CycloneDX.
func (r release) sbom(binary []byte, modules []module) ([]byte, error) {
	hash := sha256.Sum256(binary)
	bom := cyclonedx.NewBOM()
	bom.SerialNumber = serialNumber(hash)
	bom.Metadata = &cyclonedx.Metadata{
		Timestamp: r.created.Format(time.RFC3339),
		Component: &cyclonedx.Component{
			BOMRef:     packageURL(ourPath, r.version),
			Type:       cyclonedx.ComponentTypeApplication,
			Name:       ourPath,
			Version:    r.version,
			PackageURL: packageURL(ourPath, r.version),
			Licenses:   &cyclonedx.Licenses{{Expression: ourLicence}},
			Hashes:     &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(hash[:])}},
		},
	}
	components := make([]cyclonedx.Component, 0, len(modules))
	for _, m := range modules {
		var licences cyclonedx.Licenses
		for _, id := range m.licences {
			licences = append(licences, cyclonedx.LicenseChoice{License: &cyclonedx.License{ID: id}})
		}
		components = append(components, cyclonedx.Component{
			BOMRef:     packageURL(m.path, m.version),
			Type:       cyclonedx.ComponentTypeLibrary,
			Name:       m.path,
			Version:    m.version,
			PackageURL: packageURL(m.path, m.version),
			Licenses:   &licences,
		})
	}
	bom.Components = &components

	var out bytes.Buffer
	encoder := cyclonedx.NewBOMEncoder(&out, cyclonedx.BOMFileFormatJSON).SetPretty(true)
	if err := encoder.EncodeVersion(bom, cyclonedx.SpecVersion1_6); err != nil {
		return nil, fmt.Errorf("write SBOM: %w", err)
	}
	return out.Bytes(), nil
}

// packageURL names a module as scanners look it up.
func packageURL(path, version string) string { return "pkg:golang/" + path + "@" + version }

// serialNumber makes a document's UUID (RFC 9562, version 8) of what it describes.
func serialNumber(hash [sha256.Size]byte) string {
	u := hash[:16]
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
