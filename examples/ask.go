// Asks for a code at the HTTP door, with nothing but Go, and prints the reply.
//
//	go run ask.go a@example.com
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

type reply struct {
	Error *int   `json:"error"` // a pointer: an answer without it is no Success
	Email string `json:"email"`
}

func ask(door, email string) (given reply, err error) {
	body, err := json.Marshal(map[string]string{"email": email})
	if err != nil {
		return given, err
	}
	client := http.Client{Timeout: 10 * time.Second} // the door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set
	answer, err := client.Post(door+"/get_varifycode", "application/json", bytes.NewReader(body))
	if err != nil {
		return given, err
	}
	defer answer.Body.Close()
	return given, json.NewDecoder(answer.Body).Decode(&given)
}

func main() {
	log.SetFlags(0)
	door := os.Getenv("VERIFY_HTTP_DOOR")
	if door == "" {
		door = "http://127.0.0.1:8081"
	}
	given, err := ask(door, os.Args[1])
	if err != nil {
		log.Fatal("no reply: ", err)
	}
	said, _ := json.Marshal(given)
	fmt.Println(string(said))
	if given.Error == nil || *given.Error != 0 {
		os.Exit(1)
	}
}
